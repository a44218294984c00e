"""The command `report`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from installer.commands.command import Command
from installer.commands.output import encoded, output_or
from installer.settings import Attachment, Chain, Node, Ports, Shadow, take

if TYPE_CHECKING:
    from installer.commands.report.view import NodeView


@click.command(cls=Command)
@take(Attachment)
@take(Chain)
@take(Node)
@take(Ports)
@take(Shadow)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 300),
    default=2.0,
    show_default=True,
    help="Seconds over which rates are measured.",
)
@click.option(
    "-f",
    "--output-file",
    "path",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    default="-",
    help="File to write the page to  [default: standard output]",
)
@output_or("html")
def report(
    attachment: Attachment,
    chain: Chain,
    node: Node,
    ports: Ports,
    shadow: Shadow,
    seconds: float,
    path: Path,
    output: str,
) -> None:
    """Write a page about this node: the verdict, traffic, failures, maps.

    The page shows who talks with whom, which connections failed, and how full the maps are. It is one HTML file
    that needs no network, for a browser, a mail or paper. JSON and YAML have the same content.
    """
    from installer.commands.report.page_file import write
    from installer.commands.report.view import gather

    if output == "html" and str(path) == "-" and sys.stdout.isatty():
        raise click.UsageError("a page of HTML is not for a terminal: give -f FILE, or redirect the output")
    text = _text(gather(attachment, chain, node, ports, shadow, seconds), output)
    if str(path) == "-":
        click.echo(text, nl=False)
    else:
        write(path, text)
        click.echo(f"report: {path}")


def _text(view: "NodeView", output: str) -> str:
    if output == "html":
        from installer.commands.report.page import render

        return render(view)
    from installer.commands.report.node_document import report_document

    return encoded(report_document(view), output)
