"""What is attached, and what it does."""

import click

from installer.commands.output import output_option, show
from installer.settings import Attachment, take


@click.command()
@take(Attachment)
@output_option
def status(attachment: Attachment, output: str) -> None:
    """Show what is attached, the level of acceleration and why, and what it does for each pod."""
    from installer.inspect.status import status_of, table_of

    document = status_of(attachment.pins)
    show(document, output, lambda: table_of(document))
