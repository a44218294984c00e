"""What is attached, and what it does."""

import sys

import click

from installer.commands.output import output_option, show
from installer.settings import Attachment, Chain, Logging, Node, Ports, take


@click.command()
@take(Attachment)
@take(Chain)
@take(Node)
@take(Ports)
@output_option
def status(attachment: Attachment, chain: Chain, node: Node, ports: Ports, output: str) -> None:
    """Show what is attached and how full it is, the level of acceleration, the plugin's place, and the agent's health.

    Nothing is changed, and no agent is needed. Give the agent's settings, or run it where the agent runs. Exit status 1
    if the programs are not attached.
    """
    from installer.agent.logs import configure_logging
    from installer.commands.status.status_document import status_document

    configure_logging(Logging(log_level="error"))  # what is found is told in the status
    document = status_document(attachment, chain, node, ports)
    show(document, output, lambda: _table(document))
    sys.exit(0 if document["attached"] else 1)


def _table(document: dict[str, object]) -> str:
    from installer.commands.status.status_table import status_table

    return status_table(document)
