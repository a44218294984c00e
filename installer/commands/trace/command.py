"""What happens, as it happens."""

from typing import TYPE_CHECKING

import click

from installer.commands.output import output_option
from installer.settings import Attachment, take

if TYPE_CHECKING:
    from installer.commands.trace.wanted import Wanted

_VERDICTS = ("direct", "captured", "refused", "denied")


@click.command()
@take(Attachment)
@click.argument("pod", required=False)
@click.option("--dest", metavar="DESTINATION", help="Only to 10.0.0.0/8, 10.1.2.3:80, [fd00::1]:80 or :80.")
@click.option(
    "--verdict",
    type=click.Choice(_VERDICTS),
    help="Only what became this; with refused also when proxies begin and cease to listen.",
)
@click.option("--follow", "-f", is_flag=True, help="Until Ctrl-C.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0.1), help="Else for so long.")
@output_option
def trace(
    attachment: Attachment,
    pod: str | None,
    dest: str | None,
    verdict: str | None,
    follow: bool,
    seconds: float,
    output: str,
) -> None:
    """Show connections with their verdicts and rules, listeners, and processes that are killed.

    POD is NAME or NAMESPACE/NAME; all pods without. One trace at a time on a node. JSON is an object a line. UDP is
    shown where it is a query for the pod's resolver, or denied. Events that nobody can read in time are lost and
    counted; no connection waits.
    """
    from installer.commands.trace.follow_events import follow_events

    follow_events(attachment.pins, pod, _wanted(dest, verdict), None if follow else seconds, output)


def _wanted(dest: str | None, verdict: str | None) -> "Wanted":
    from installer.commands.trace.wanted import BadFilter, Wanted

    try:
        return Wanted.of(dest, verdict)
    except BadFilter as error:
        raise click.BadParameter(str(error), param_hint="'--dest'") from None
