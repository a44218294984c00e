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
@click.argument("name", metavar="[POD]", required=False)
@click.option("--kill", "killing", is_flag=True, help="Reset open connections that would be refused now.")
@output_option
def deny(attachment: Attachment, proc: Path, name: str | None, killing: bool, output: str) -> None:
    """Show the ports that pods deny, by sidestep.io/deny-outbound-ports and sidestep.io/deny-inbound-ports.

    POD is NAME or NAMESPACE/NAME; all pods without. An annotation that changes counts within a second for new
    connections; open ones go on unless --kill ends them. Exit status 1 if that fails for any pod; the others get it.
    """
    from bpf.tables import Tables
    from installer.commands.deny.denied import denial_document, denials_table, deniers, kill

    with Tables(attachment.pins.look_only()) as tables:
        pods = deniers(attachment.pins, tables, name)
        documents = [denial_document(pod, tables) for pod in pods]
    closed = {pod.cookie: outcome for pod, outcome in kill(pods, proc)} if killing else {}
    for pod, document in zip(pods, documents, strict=True) if killing else ():
        outcome = closed[pod.cookie]
        document |= {"killed": list(outcome.destinations), "problem": outcome.problem}
    show(documents, output, lambda: denials_table(documents, name))
    if killing and output == "table":
        count = sum(len(each["killed"]) for each in documents)
        click.echo(f"{count} connection{'s'[: count != 1]} reset")
    if problems := [f"{each['pod']}: {each['problem']}" for each in documents if each.get("problem")]:
        raise NotClosed(f"not all of the denied connections are closed: {'; '.join(problems)}")
