"""The command `status`."""

import sys
import time

import click

from installer.commands.command import Command
from installer.commands.output import output_option, show
from installer.settings import Attachment, Chain, Logging, Node, Ports, Shadow, take

_WAIT_SECONDS = 60.0  # if --wait is given without a number
_PAUSE = 1.0  # seconds between two looks


@click.command(cls=Command)
@take(Attachment)
@take(Chain)
@take(Node)
@take(Ports)
@take(Shadow)
@click.option("-v", "--verbose", is_flag=True, help="Show programs, maps and pods as tables, too.")
@click.option(
    "--wait",
    metavar="[SECONDS]",
    type=click.FloatRange(0),
    is_flag=False,
    flag_value=_WAIT_SECONDS,
    help=f"Look again until the verdict is OK, or until this time is up  [without a number: {_WAIT_SECONDS:g}]",
)
@output_option
def status(
    attachment: Attachment,
    chain: Chain,
    node: Node,
    ports: Ports,
    shadow: Shadow,
    verbose: bool,
    wait: float | None,
    output: str,
) -> None:
    """Show whether capture works on this node, and what to do if it does not.

    The first line is the verdict: OK, WRONG or UNKNOWN. Below it is what is wrong (✗), what can't be told (?) and what
    is worth knowing (·), with what to do about it (→). It comes from looking at programs, inbound steering, processes
    and proxies of pods, the plugin and its place in the CNI chain, pods with a sidecar that are not captured, the
    acceleration level, maps that are more than 80 % full, the agent with its readiness, and in ambient mode ztunnel
    and the pods that it does not have.

    The exit status is 0 only if all is well, 1 if something is wrong, and 3 if it can't be told.

    The command changes nothing and needs no agent. Give it the agent's settings, or run it in the agent's container.
    """
    from installer.agent.logs import configure_logging
    from installer.commands.status.status_document import status_document
    from installer.verdict.node import verdict_on

    configure_logging(Logging(log_level="error"))  # the status itself reports what was found
    until = time.monotonic() + (wait or 0)
    while True:
        document = status_document(attachment, chain, node, ports, shadow)
        exit_status = verdict_on(document).exit_status
        if exit_status == 0 or time.monotonic() >= until:
            break
        time.sleep(min(_PAUSE, max(0.0, until - time.monotonic())))
    show(document, output, lambda: _table(document, verbose or output == "wide"))
    sys.exit(exit_status)


def _table(document: dict[str, object], is_verbose: bool) -> str:
    from installer.commands.status.status_table import status_table

    return status_table(document, is_verbose)
