"""Denied ports: what they are, what they have refused, and closing what is older than they are."""

from pathlib import Path

import click

from bpf.errors import SidestepError
from installer.commands.output import output_option, show
from installer.settings import Attachment, Node, take, take_one


class NotClosed(SidestepError):
    """Connections that are denied go on; the message says whose, and why."""


@click.command()
@take(Attachment)
@take_one(Node, "proc")
@click.argument("pod", required=False)
@click.option("--kill", "killing", is_flag=True, help="Reset open connections that would be refused now.")
@output_option
def deny(attachment: Attachment, proc: Path, pod: str | None, killing: bool, output: str) -> None:
    """Show the ports that pods deny, by sidestep.io/deny-outbound-ports and sidestep.io/deny-inbound-ports.

    POD is NAME or NAMESPACE/NAME; all pods without. An annotation that changes counts within a second for new
    connections; open ones go on unless --kill ends them. Exit status 1 if that fails for any pod; the others get it.
    """
    from bpf.tables import Tables
    from installer.inspect.denied import deniers, kill, table_of

    with Tables(attachment.pins.look_only()) as tables:
        pods = deniers(tables, pod)
    documents = [each.document() for each in pods]
    closed = {str(each.identity): outcome for each, outcome in kill(attachment.pins, pods, proc)} if killing else {}
    for document in documents if killing else ():
        outcome = closed[document["pod"]]
        document |= {"killed": list(outcome.destinations), "problem": outcome.problem}
    show(documents, output, lambda: table_of(pods, pod))
    if killing and output == "table":
        count = sum(len(each.destinations) for each in closed.values())
        click.echo(f"{count} connection{'s'[: count != 1]} reset")
    if problems := [f"{name}: {each.problem}" for name, each in closed.items() if each.problem]:
        raise NotClosed(f"not all of the denied connections are closed: {'; '.join(problems)}")
