"""The commands about the command line itself: `version` and `help`."""

import platform

import click

from installer import VERSION
from installer.commands.command import Command
from installer.commands.output import output_option, show


@click.command(cls=Command)
@output_option
def version(output: str) -> None:
    """Show this command's version, and the kernel's."""
    document = {"version": VERSION, "kernel": platform.release()}
    show(document, output, lambda: f"sidestep {VERSION}, kernel {platform.release()}\n")


@click.command("help", cls=Command)
@click.argument("command", required=False)
@click.pass_context
def help(context: click.Context, command: str | None) -> None:
    """Show the help of COMMAND, or the list of commands."""
    root = context.find_root()
    if command is None:
        click.echo(root.get_help())
        return
    assert isinstance(root.command, click.Group)
    _, found, _ = root.command.resolve_command(root, [command])
    assert found is not None
    with click.Context(found, info_name=command, parent=root) as described:
        click.echo(found.get_help(described))
