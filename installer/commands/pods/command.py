"""The enrolled pods."""

import click

from installer.commands.output import output_option, show
from installer.settings import Attachment, Logging, Node, take


@click.command()
@take(Attachment)
@take(Node)
@click.argument("name", required=False)
@output_option
def pods(attachment: Attachment, node: Node, output: str, name: str | None) -> None:
    """List the enrolled pods; with NAME or NAMESPACE/NAME tell all about one, and what its Pod asks for now.

    The policy is told in Istio's words: the annotations that would give it. Changed annotations apply to new pods only,
    but for those that deny ports, which count within a second.
    """
    from installer.agent.logs import configure_logging
    from installer.commands.pods.pod_document import pod_document, pods_documents
    from installer.commands.pods.pods_table import pod_text, pods_table

    configure_logging(Logging(log_level="warning"))  # to stderr: manifests that can't be read
    if name is None:
        documents = pods_documents(attachment, node)
        show(documents, output, lambda: pods_table(documents))
    else:
        document = pod_document(attachment, node, name)
        show(document, output, lambda: pod_text(document))
