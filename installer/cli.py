"""`sidestep …`: exit 0 good, 1 failed with one line on stderr, 2 wrong usage.

The agent's imports are slow and large, so a command's module is imported when the command is asked for.
"""

import sys
from importlib import import_module

import click

from bpf.errors import SidestepError
from bpf.kernel import require_root

# command → the module of installer/commands that has it
COMMANDS = {
    "accelerate": "programs",
    "agent": "node",
    "attach": "programs",
    "detach": "programs",
    "probe": "node",
    "report": "report",
    "status": "status",
    "top": "top",
    "uninstall": "node",
}
_WITHOUT_ROOT = ("probe",)  # whose table says it among other things


class _Commands(click.Group):
    """Imports a command when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"installer.commands.{COMMANDS[cmd_name]}"), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def cli(context: click.Context) -> None:
    """Istio sidecar traffic capture at the socket layer: no iptables, no conntrack."""
    if context.invoked_subcommand not in _WITHOUT_ROOT:
        require_root()


def main() -> None:
    """The entry point: errors meant for the operator are one line, not a traceback."""
    try:
        cli(prog_name="sidestep")
    except SidestepError as error:
        click.echo(f"sidestep: {error}", err=True)
        sys.exit(1)
