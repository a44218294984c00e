"""The command `shadow`."""

import sys

import click

from bpf.errors import SidestepError
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
from installer.settings import Attachment, take


@click.command(cls=Command)
@take(Attachment)
@click.argument("name", required=False, shell_complete=complete_pod)
@namespace_option("Pods")
@all_namespaces_option
@no_headers_option
@output_option
def shadow(
    attachment: Attachment, output: str, name: str | None, namespace: str, everywhere: bool, no_headers: bool
) -> None:
    """Show whether sidestep decides as Istio's rules do, for the pods that an agent with --shadow watches.

    NAME is the pod's NAME or NAMESPACE/NAME. For each pod the table says how many connections were compared, and how
    many netfilter has treated in another way than sidestep would have. Each kind of difference is listed with remote
    end, port, process, what sidestep would have done and by which rule, and what netfilter did. What could not be
    compared is counted by its reason. Pods that have ended are summed up in one row.

    The exit status is 0 if there is no difference, 1 if there are differences, and 3 if nothing was compared, or if it
    can't be told.

    \b
        sidestep shadow                      all shadow pods of this node
        sidestep shadow shop/web-0           one of them
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    from installer.commands.shadow.shadow_document import exit_status, shadow_document, shadow_documents
    from installer.commands.shadow.shadow_table import shadow_text

    wanted = one_namespace(namespace, everywhere)
    try:
        if name is None:
            documents = shadow_documents(attachment.pins, wanted)
        else:
            documents = [shadow_document(attachment.pins, qualified(name, namespace))]
    except SidestepError as error:  # 1 would say that there are differences
        click.echo(f"sidestep: {error}", err=True)
        sys.exit(exit_status(()))
    show(documents if name is None else documents[0], output, lambda: shadow_text(documents, not no_headers))
    sys.exit(exit_status(documents))
