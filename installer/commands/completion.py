"""`sidestep completion`: the script that makes a shell complete `sidestep …`."""

import click
from click.shell_completion import ShellComplete, get_completion_class

from installer.commands.command import Command

SHELLS = ("bash", "zsh", "fish")


@click.command(cls=Command)
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script for completing sidestep's commands.

    SHELL is bash, zsh or fish. The script needs `sidestep` on the PATH. To install it:

    \b
        bash:  sidestep completion bash > /etc/bash_completion.d/sidestep
        zsh:   sidestep completion zsh > "${fpath[1]}/_sidestep"
        fish:  sidestep completion fish > ~/.config/fish/completions/sidestep.fish

    To try it in the current shell only: eval "$(sidestep completion bash)". Completion needs neither root nor an agent.
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    from installer.commands.cli import COMPLETION, NAME

    found = get_completion_class(shell)
    if found is None:
        raise click.BadParameter(f"click has no completion for {shell}", context)
    # not BashComplete's own source(): it starts bash to check the version, and the image may have no bash
    click.echo(ShellComplete.source(found(context.find_root().command, {}, NAME, COMPLETION)), nl=False)
