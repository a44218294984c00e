"""The command `trace`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from installer.commands.command import Command, complete_pod, namespace_option, qualified
from installer.commands.output import streaming_output_option
from installer.settings import Attachment, Node, take, take_one

if TYPE_CHECKING:
    from installer.commands.trace.wanted import Wanted

_VERDICTS = ("direct", "captured", "refused", "denied", "unreachable")


@click.command(cls=Command)
@take(Attachment)
@take_one(Node, "proc")
@click.argument("pod", required=False, shell_complete=complete_pod)
@namespace_option("POD is")
@click.option(
    "--dest",
    metavar="DESTINATION",
    help="Only to this destination, for example 10.0.0.0/8, 10.1.2.3:80, [fd00::1]:80 or :80.",
)
@click.option(
    "--verdict",
    type=click.Choice(_VERDICTS),
    help="Only connections with this verdict. With refused, also when proxies start and stop listening.",
)
@click.option("--follow", "-f", is_flag=True, help="Run until Ctrl-C.")
@click.option(
    "--seconds", default=10.0, show_default=True, type=click.FloatRange(0.1), help="How long to run without --follow."
)
@streaming_output_option
def trace(
    attachment: Attachment,
    proc: Path,
    pod: str | None,
    namespace: str,
    dest: str | None,
    verdict: str | None,
    follow: bool,
    seconds: float,
    output: str,
) -> None:
    """Show connections and their verdicts as they happen.

    It also shows the rule of each verdict, when proxies start and stop listening, and processes that are killed. UDP is
    shown only if it is captured DNS or denied.

    POD is NAME or NAMESPACE/NAME; without it, all pods are traced. A node can run one trace at a time. As json or
    jsonl, the output is one object per line. Events that cannot be read in time are lost and counted; no connection
    waits for the trace.
    If another version of sidestep takes the node's pods over, the trace ends with exit status 1.
    """
    from installer.commands.trace.follow_events import follow_events

    follow_events(
        attachment.pins,
        proc,
        pod and qualified(pod, namespace),
        _wanted(dest, verdict),
        None if follow else seconds,
        output,
    )


def _wanted(dest: str | None, verdict: str | None) -> "Wanted":
    from installer.commands.trace.wanted import BadFilter, Wanted

    try:
        return Wanted.of(dest, verdict)
    except BadFilter as error:
        raise click.BadParameter(str(error), param_hint="'--dest'") from None
