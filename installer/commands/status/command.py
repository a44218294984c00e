"""The command `status`."""

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
    """Show the state of this node: programs, plugin and agent.

    It shows what is attached and how full the maps are, the acceleration level, the plugin and its place in the CNI
    chain, pods with a sidecar that sidestep does not capture, and the agent's health. The exit status is 1 if the
    programs are not attached, if a pod is not steered, if a pod has stray processes, or if istio-cni captures a pod as
    well.

    The command changes nothing and needs no agent. Give it the agent's settings, or run it in the agent's container.
    """
    from installer.agent.logs import configure_logging
    from installer.commands.status.status_document import status_document

    configure_logging(Logging(log_level="error"))  # the status itself reports what was found
    document = status_document(attachment, chain, node, ports)
    show(document, output, lambda: _table(document))
    faults = document["open_pods"], document["pods_with_strays"], document["sidecars"]["captured_twice"]
    sys.exit(0 if document["attached"] and not any(faults) else 1)


def _table(document: dict[str, object]) -> str:
    from installer.commands.status.status_table import status_table

    return status_table(document)
