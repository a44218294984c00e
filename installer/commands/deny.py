"""Denied ports: what they are, what they have refused, and closing what is older than they are."""

import click

from installer.commands.output import output_option, show
from installer.settings import Attachment, Node, take


@click.command()
@take(Attachment)
@take(Node)
@click.argument("pod", required=False)
@click.option("--kill", "killing", is_flag=True, help="Reset open connections that would be refused now.")
@output_option
def deny(attachment: Attachment, node: Node, pod: str | None, killing: bool, output: str) -> None:
    """Show the ports that pods deny, by sidestep.io/deny-outbound-ports and sidestep.io/deny-inbound-ports.

    POD is NAME or NAMESPACE/NAME; all pods without. An annotation that changes counts within a second for new
    connections; open ones go on unless --kill ends them.
    """
    from bpf.tables import Tables
    from installer.inspect.denied import deniers, kill, table_of

    with Tables(attachment.pins) as tables:
        pods = deniers(tables, pod)
    documents = [each.document() for each in pods]
    killed = {str(each.identity): gone for each, gone in kill(attachment.pins, pods, node.proc)} if killing else {}
    for document in documents if killing else ():
        document["killed"] = killed.get(document["pod"], [])
    show(documents, output, lambda: table_of(pods))
    if killing and output == "table":
        count = sum(map(len, killed.values()))
        click.echo(f"{count} connection{'s'[: count != 1]} reset")
