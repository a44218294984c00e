"""What happens, as it happens."""

import click

from installer.settings import Attachment, take

_VERDICTS = ("direct", "captured", "refused", "denied")


@click.command()
@take(Attachment)
@click.argument("pod", required=False)
@click.option("--dest", metavar="DESTINATION", help="Only to 10.0.0.0/8, 10.1.2.3:80, [fd00::1]:80 or :80.")
@click.option("--verdict", type=click.Choice(_VERDICTS), help="Only what became this.")
@click.option("--follow", "-f", is_flag=True, help="Until Ctrl-C.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0.1), help="Else for so long.")
@click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="json: an object a line."
)
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

    POD is NAME or NAMESPACE/NAME; all pods without. One trace at a time on a node. Events that nobody can read in time
    are lost and counted; no connection waits.
    """
    from installer.inspect.trace.events import Wanted
    from installer.inspect.trace.follow import as_json, as_line
    from installer.inspect.trace.follow import trace as show_events

    write = as_json if output == "json" else as_line
    show_events(attachment.pins, pod, Wanted.of(dest, verdict), None if follow else seconds, write)
