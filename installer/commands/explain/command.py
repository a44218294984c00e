"""What becomes of one connection, and why."""

import sys
from pathlib import Path
from typing import Any

import click

from installer.commands.output import output_option, show
from installer.settings import PORT, Attachment, Node, take, take_one

_NO_ID = 0xFFFFFFFF  # what the kernel takes for nobody


@click.command()
@take(Attachment)
@take_one(Node, "proc")
@click.argument("pod")
@click.argument("dest", required=False)
@click.option("--inbound", metavar="FROM", help="Explain what arrives from this address instead.")
@click.option("--port", type=PORT, help="Port of the pod that it arrives on  [default: all]")
@click.option("--to", metavar="ADDRESS", help="Address of the pod that it arrives at.")
@click.option("--as-proxy", is_flag=True, help="The pod's proxy connects.")
@click.option("--uid", type=click.IntRange(0, _NO_ID - 1), help="User that connects, as the pod has it  [default: 0]")
@click.option("--gid", type=click.IntRange(0, _NO_ID - 1), help="Its primary group  [default: 0]")
@click.option("--udp", is_flag=True, help="A datagram instead of a TCP connection.")
@click.option("--source", metavar="ADDRESS", help="Address that the socket is bound to.")
@click.option("--interface", metavar="NAME", help="Interface that it is bound to or arrives on  [default: by route]")
@click.option("--mark", type=click.IntRange(0, 0xFFFFFFFF), help="SO_MARK of the socket  [default: 0]")
@click.option("--try", "is_tried", is_flag=True, help="Make the connection too: exit status 1 if that is different.")
@output_option
def explain(attachment: Attachment, proc: Path, output: str, **options: Any) -> None:
    """Say whether a connection of POD to DEST would be captured, by which rule and annotation, and who gets it.

    DEST is ADDRESS:PORT or [IPV6]:PORT. What the kernel's maps have of the pod decides, not what its annotations say by
    now.
    """
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
    question = Question(**options)
    try:
        question.require_endpoints()
    except BadAddress as error:
        raise click.BadParameter(str(error)) from error
    document = answer(attachment.pins, proc, question)
    show(document, output, lambda: explanation_text(document))
    sys.exit(0 if document.get("try", {"agrees": True})["agrees"] else 1)
