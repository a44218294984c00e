"""The command `pods`."""

import click

from installer.commands.output import output_option, show
from installer.settings import Attachment, Logging, Node, take


@click.command()
@take(Attachment)
@take(Node)
@click.argument("name", required=False)
@output_option
def pods(attachment: Attachment, node: Node, output: str, name: str | None) -> None:
    """List the enrolled pods, or show everything about one.

    NAME is the pod's NAME or NAMESPACE/NAME. Its policy is shown in Istio's words: the annotations that would give this
    policy. "Pod now" compares it with what the Pod asks for now. Changed annotations apply to new pods only, except
    those that deny ports: they apply to running pods within a second.

    Below the table are the pods that are not captured, with the reason: those that have a sidecar, and those that the
    plugin or the agent let pass when they were made. Only a running agent knows the latter.
    """
    from installer.agent.logs import configure_logging
    from installer.commands.pods.pod_document import others_of, pod_document, pods_documents
    from installer.commands.pods.pods_table import pod_text, pods_table

    configure_logging(Logging(log_level="warning"))  # manifests that can't be read are reported on standard error
    if name is None:
        documents = pods_documents(attachment, node)
        show(documents, output, lambda: pods_table(documents, *others_of(attachment, node)))
    else:
        document = pod_document(attachment, node, name)
        show(document, output, lambda: pod_text(document))
