"""What makes a shell complete `sidestep …`."""

import click
from click.shell_completion import ShellComplete, get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes this command's words in SHELL; it needs `sidestep` on the PATH.

    \b
        bash:  sidestep completion bash > /etc/bash_completion.d/sidestep
        zsh:   sidestep completion zsh > "${fpath[1]}/_sidestep"
        fish:  sidestep completion fish > ~/.config/fish/completions/sidestep.fish

    For the shell at hand alone: eval "$(sidestep completion bash)". Completing needs neither root nor an agent.
    """  # noqa: D301 (\b is click's mark of a paragraph that stays as it is)
    from installer.commands.cli import COMPLETION, NAME

    found = get_completion_class(shell)
    if found is None:
        raise click.BadParameter(f"click has no completion for {shell}", context)
    # not its own source(): for bash that starts a bash to see how old it is, and the image may have none
    click.echo(ShellComplete.source(found(context.find_root().command, {}, NAME, COMPLETION)), nl=False)
