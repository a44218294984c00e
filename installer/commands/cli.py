"""`sidestep …`: the list of commands. ending.py has their exit statuses and error messages.

A command's module is imported only when it is needed: the agent's imports are slow and large.
"""

import os
import sys
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib import import_module
from typing import Any

import click
from click.exceptions import NoSuchCommand
from click.shell_completion import shell_complete

from bpf.kernel import require_root
from installer import VERSION
from installer.commands import ending
from installer.commands.crash_files import CrashFiles

NAME = "sidestep"
COMPLETION = "_SIDESTEP_COMPLETE"  # environment variable; the shell's completion function puts its request there

# command → its module in installer/commands
COMMANDS = {
    "accelerate": "programs",
    "agent": "node",
    "attach": "programs",
    "bugreport": "bugreport.command",
    "completion": "completion",
    "coverage": "coverage.command",
    "deny": "deny.command",
    "detach": "programs",
    "explain": "explain.command",
    "flows": "flows.command",
    "giveback": "takeover.command",
    "help": "about",
    "install-cni": "install_cni",
    "kubectl-plugin": "kubectl_plugin",
    "maps": "maps.command",
    "migrate": "migrate.command",
    "pods": "pods.command",
    "probe": "node",
    "report": "report.command",
    "shadow": "shadow.command",
    "status": "status.command",
    "takeover": "takeover.command",
    "top": "top.command",
    "trace": "trace.command",
    "uninstall": "node",
    "version": "about",
}
# how --help lists them
_GROUPS = {
    "See what is going on": (
        "status",
        "pods",
        "explain",
        "coverage",
        "flows",
        "shadow",
        "trace",
        "top",
        "report",
        "maps",
        "deny",
        "bugreport",
    ),
    "Prepare and change a node": (
        "probe",
        "migrate",
        "takeover",
        "giveback",
        "agent",
        "install-cni",
        "attach",
        "accelerate",
        "detach",
        "uninstall",
    ),
    "The command line": ("kubectl-plugin", "completion", "version", "help"),
}
# probe reports a missing root in its table
_WITHOUT_ROOT = ("completion", "help", "kubectl-plugin", "probe", "version")


@cache
def _command(name: str) -> click.Command:
    command: click.Command = getattr(import_module(f"installer.commands.{COMMANDS[name]}"), name.replace("-", "_"))
    if name not in _WITHOUT_ROOT and command.callback:
        command.callback = _as_root(command.callback)
    if command.callback:
        command.callback = _with_its_run_dir(command.callback)
    return command


def _with_its_run_dir(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Have the traceback of an internal error written to the run directory that the command's options say."""

    @wraps(callback)
    def noted(*args: Any, **options: Any) -> Any:
        context = click.get_current_context(silent=True)
        if context and (crashes := context.find_object(CrashFiles)):
            crashes.run_dir = options.get("cni_agent_run_dir")
        return callback(*args, **options)

    return noted


def _as_root(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Check for root only when the command runs, so that everybody can read its --help."""

    @wraps(callback)
    def checked(*args: Any, **options: Any) -> Any:
        require_root()
        return callback(*args, **options)

    return checked


class _Commands(click.Group):
    """Imports a command's module when the command is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in groups."""
        width = formatter.width - 6 - max(map(len, COMMANDS))
        for title, names in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, _command(name).get_short_help_str(width)) for name in names])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand as error:  # click's own list, from which it suggests names, is empty
            raise NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, "--version", prog_name=NAME, message="%(prog)s %(version)s")
def cli() -> None:
    """Istio sidecar traffic capture at the socket layer: no iptables, no conntrack.

    If something is wrong, begin with `sidestep status`, then `sidestep explain POD POD:PORT`.
    """


def _run(crashes: CrashFiles | None = None) -> int:
    """Do the same as click's main(), but let ending.py handle exits and errors."""
    if instruction := os.environ.get(COMPLETION):
        return shell_complete(cli, {}, NAME, COMPLETION, instruction)
    with cli.make_context(NAME, sys.argv[1:], obj=crashes) as context:
        cli.invoke(context)
    return ending.GOOD


def main() -> None:
    """The entry point."""
    crashes = CrashFiles()
    sys.exit(ending.run_command(partial(_run, crashes), crashes))
