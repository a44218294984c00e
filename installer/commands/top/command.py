"""The command `top`."""

from pathlib import Path

import click

from installer.commands.command import Command
from installer.settings import Attachment, Node, take, take_one


@click.command(cls=Command)
@take(Attachment)
@take_one(Node, "proc")
@click.option(
    "--seconds", type=click.FloatRange(0.2, 60), default=1.0, show_default=True, help="Seconds between two updates."
)
def top(attachment: Attachment, proc: Path, seconds: float) -> None:
    """Show rates of connections and messages live, pod by pod.

    The keys c, d, f, a and n sort by captured, direct, failed, accelerated and name. q or Ctrl-C quits. If another
    version of sidestep takes the node's pods over, top ends with exit status 1.
    """
    from installer.commands.top.live import show_top

    show_top(attachment.pins, seconds, proc)
