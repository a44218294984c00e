"""The command `explain`."""

import sys
from typing import Any

import click

from installer.commands.command import Command, complete_pod, namespace_option
from installer.commands.output import output_option, show
from installer.settings import PORT, Attachment, Logging, Node, take

_NO_ID = 0xFFFFFFFF  # (uid_t)-1, which the kernel takes for no id


@click.command(cls=Command)
@take(Attachment)
@take(Node)
@click.argument("pod", shell_complete=complete_pod)
@click.argument("dest", required=False, shell_complete=complete_pod)
@namespace_option("POD, and DEST if that is a pod, are")
@click.option("--inbound", metavar="FROM", help="Explain a connection from this address to POD.")
@click.option("--port", type=PORT, help="Port of POD that the connection arrives at  [default: all]")
@click.option("--to", metavar="ADDRESS", help="Address of POD that the connection arrives at.")
@click.option("--as-proxy", is_flag=True, help="POD's proxy opens the connection.")
@click.option(
    "--uid",
    type=click.IntRange(0, _NO_ID - 1),
    help="User id of the process that connects, as seen in the pod  [default: 0]",
)
@click.option("--gid", type=click.IntRange(0, _NO_ID - 1), help="Primary group id of that process  [default: 0]")
@click.option("--udp", is_flag=True, help="Explain a UDP datagram instead of a TCP connection.")
@click.option("--source", metavar="ADDRESS", help="Address that the socket is bound to.")
@click.option(
    "--interface",
    metavar="NAME",
    help="Interface that the socket is bound to, or that it arrives on  [default: by route]",
)
@click.option("--mark", type=click.IntRange(0, 0xFFFFFFFF), help="SO_MARK of the socket  [default: 0]")
@click.option(
    "--try", "is_tried", is_flag=True, help="Also make the connection. The exit status is 1 if it went another way."
)
@output_option
def explain(attachment: Attachment, node: Node, output: str, namespace: str, **options: Any) -> None:
    """Explain whether a connection would be captured, and why.

    POD opens the connection to DEST. With --inbound, POD receives it. POD is NAME or NAMESPACE/NAME.

    If DEST is POD or POD:PORT, the answer walks the whole way: what the client's rules decide, its proxy, the way, what
    the server's rules decide, its proxy, and the application. The first line says what is wrong. The exit status is 1
    if something is, and 3 if something can't be looked at.

    If DEST is ADDRESS:PORT or [IPV6]:PORT, the answer is about POD alone: the rule, the annotation behind it, and who
    receives the connection. For UDP, DEST ends with /udp.

    The pod's entries in the kernel's maps decide. The Pod's annotations may have changed since. Misspelt
    annotations are named.

    \b
        sidestep explain web-0 db-0:5432               the whole way from one pod to another
        sidestep explain web-0 10.0.0.7:443 --try      one decision, and one connection
        sidestep explain web-0 10.96.0.10:53/udp       a DNS query
        sidestep explain db-0 --inbound 10.0.0.9       all ports of db-0, from this address
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    from installer.agent.logs import configure_logging
    from installer.commands.explain.explanation import explanation_text
    from installer.commands.explain.question import BadAddress, Question, answer

    is_inbound = options["inbound"] is not None
    if is_inbound == (options["dest"] is not None):
        raise click.UsageError("give either DEST or --inbound FROM")
    for name in ("port", "to") if not is_inbound else ("as_proxy", "uid", "gid", "source", "mark"):
        if options[name] is not None and options[name] is not False:
            flag = f"--{name.replace('_', '-')}"
            needs = "DEST, and not --inbound" if is_inbound else "--inbound"
            raise click.UsageError(f"{flag} needs {needs}")
    if options["as_proxy"] and (options["uid"], options["gid"]) != (None, None):
        raise click.UsageError("give either --as-proxy or --uid and --gid")
    if is_inbound and options["port"] is None and (options["is_tried"] or options["udp"]):
        raise click.UsageError("give --port with --try or --udp")
    question = Question(**options, namespace=namespace)
    try:
        question.require_endpoints()
    except BadAddress as error:
        raise click.BadParameter(str(error)) from error
    configure_logging(Logging(log_level="warning"))  # manifests that can't be read are reported on standard error
    document = answer(attachment.pins, node, question)
    if "steps" in document:
        from installer.commands.explain.walk_text import exit_status, walk_text

        show(document, output, lambda: walk_text(document))
        sys.exit(exit_status(document))
    show(document, output, lambda: explanation_text(document))
    sys.exit(0 if document.get("try", {"agrees": True})["agrees"] else 1)
