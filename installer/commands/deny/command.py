"""The command `deny`."""

from pathlib import Path

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
from installer.settings import Attachment, Node, take, take_one


class NotClosed(SidestepError):
    """Some connections that should be reset go on. The message names their pods and the reasons."""


@click.command(cls=Command)
@take(Attachment)
@take_one(Node, "proc")
@click.argument("name", metavar="[POD]", required=False, shell_complete=complete_pod)
@namespace_option("Pods")
@all_namespaces_option
@no_headers_option
@click.option("--kill", "killing", is_flag=True, help="Reset open connections that would be refused if they were new.")
@output_option
def deny(
    attachment: Attachment,
    proc: Path,
    name: str | None,
    namespace: str,
    everywhere: bool,
    no_headers: bool,
    killing: bool,
    output: str,
) -> None:
    """Show the ports that pods deny, and what they have refused.

    POD is NAME or NAMESPACE/NAME; without it, all pods are shown. The annotations sidestep.io/deny-outbound-ports and
    sidestep.io/deny-inbound-ports name the ports. A changed annotation applies to new connections within a second. Open
    connections go on unless --kill resets them. If that fails for one pod, the others are still done, and the exit
    status is 1.
    """
    from bpf.tables import Tables
    from installer.commands.deny.denied import denial_document, denials_table, deniers, kill

    with Tables(attachment.pins.look_only()) as tables:
        wanted = one_namespace(namespace, everywhere)
        pods = deniers(attachment.pins, tables, name and qualified(name, namespace))
        pods = [pod for pod in pods if wanted in ("", pod.identity.namespace)]
        documents = [denial_document(pod, tables) for pod in pods]
    closed = {pod.cookie: outcome for pod, outcome in kill(pods, proc)} if killing else {}
    for pod, document in zip(pods, documents, strict=True) if killing else ():
        outcome = closed[pod.cookie]
        document |= {"killed": list(outcome.destinations), "problem": outcome.problem}
    show(documents, output, lambda: denials_table(documents, name, not no_headers))
    if killing and output in ("table", "wide"):
        count = sum(len(each["killed"]) for each in documents)
        click.echo(f"{count} connection{'s'[: count != 1]} reset")
    if problems := [f"{each['pod']}: {each['problem']}" for each in documents if each.get("problem")]:
        raise NotClosed(f"some denied connections are still open: {'; '.join(problems)}")
