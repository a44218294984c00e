"""The node, live in the terminal."""

import click

from installer.settings import Attachment, take


@click.command()
@take(Attachment)
@click.option("--seconds", type=click.FloatRange(0.2, 60), default=1.0, show_default=True, help="Between two looks.")
def top(attachment: Attachment, seconds: float) -> None:
    """Show live what each enrolled pod's connections and messages become, sorted as you like.

    Keys: c d f a n sort by captured, direct, failed, accelerated, name; q or Ctrl-C ends it.
    """
    from installer.commands.top.live import show_top

    show_top(attachment.pins, seconds)
