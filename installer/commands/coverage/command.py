"""The command `coverage`."""

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
def coverage(
    attachment: Attachment,
    proc: Path,
    output: str,
    name: str | None,
    namespace: str,
    everywhere: bool,
    no_headers: bool,
) -> None:
    """Show how much of the pods' traffic is captured, and what went past their proxies.

    NAME is the pod's NAME or NAMESPACE/NAME. Of one pod, each remote end is shown that was reached past the proxy, or
    refused: protocol, port, rule, annotation, process, how often, and when first and last. A connection counts once. So
    does each datagram of a UDP socket that is not connected, and each opening of a socket whose packets can't be seen
    one by one (raw, ICMP). What stays in the pod, and what the proxy sends, is not past the proxy.

    Below is what can't be told of the pod, such as what processes outside of its cgroups send.

    \b
        sidestep coverage                    the mesh pods of this node
        sidestep coverage shop/web-0         everything past the proxy of one
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    from installer.commands.coverage.coverage_document import coverage_document, coverage_documents
    from installer.commands.coverage.coverage_table import coverage_table, coverage_text

    wanted = one_namespace(namespace, everywhere)
    if name is None:
        documents = coverage_documents(attachment.pins, proc, wanted)
        show(documents, output, lambda: coverage_table(documents, not no_headers))
    else:
        document = coverage_document(attachment.pins, proc, qualified(name, namespace))
        show(document, output, lambda: coverage_text(document, not no_headers))
