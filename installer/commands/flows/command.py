"""The command `flows`."""

from pathlib import Path

import click

from installer.commands.command import (
    Command,
    all_namespaces_option,
    complete_pod,
    namespace_option,
    no_headers_option,
    one_namespace,
    qualified,
)
from installer.commands.output import output_option, show
from installer.settings import Attachment, Node, take, take_one


@click.command(cls=Command)
@take(Attachment)
@take_one(Node, "proc")
@click.argument("name", required=False, shell_complete=complete_pod)
@namespace_option("Pods")
@all_namespaces_option
@no_headers_option
@output_option
def flows(
    attachment: Attachment,
    proc: Path,
    output: str,
    name: str | None,
    namespace: str,
    everywhere: bool,
    no_headers: bool,
) -> None:
    """Show what pods' connections carry, and with whom.

    NAME is the pod's NAME or NAMESPACE/NAME. Of one pod, each destination is shown that its application has called, the
    original one if the connection was captured, and each port of the pod that others have called: open and closed
    connections, the application's bytes, segments that were sent again, and on average the round trip time and how long
    the connections have lasted. Open connections are counted as they are now.

    Outbound is counted at the application's socket, inbound at the one that accepts: the proxy's, or the application's
    if it is not captured. The proxy's own connections are not counted, nor what stays in the pod. So what is told of
    the network between two mesh pods, segments sent again and round trip time, is in the accepting pod's inbound list.
    Of captured outbound connections, the two are those of the way to the pod's own proxy.

    \b
        sidestep flows                    the mesh pods of this node
        sidestep flows shop/web-0         the destinations and ports of one
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    from installer.commands.flows.flows_document import flows_document, flows_documents
    from installer.commands.flows.flows_table import flows_table, flows_text

    wanted, is_wide = one_namespace(namespace, everywhere), output == "wide"
    if name is None:
        documents = flows_documents(attachment.pins, proc, wanted)
        show(documents, output, lambda: flows_table(documents, is_wide, not no_headers))
    else:
        document = flows_document(attachment.pins, proc, qualified(name, namespace))
        show(document, output, lambda: flows_text(document, is_wide, not no_headers))
