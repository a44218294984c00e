"""A node on one page."""

import sys
from pathlib import Path

import click

from installer.settings import Attachment, Node, take, take_one


@click.command()
@take(Attachment)
@take_one(Node, "kubernetes_node_name")
@take_one(Node, "proc")
@click.option(
    "--seconds", type=click.FloatRange(0.1, 300), default=2.0, show_default=True, help="How long rates are measured."
)
@click.option(
    "-o",
    "--output-file",
    "path",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    default="-",
    help="Where the page goes  [default: standard output]",
)
def report(attachment: Attachment, kubernetes_node_name: str, proc: Path, seconds: float, path: Path) -> None:
    """Write a page about this node: who talks with whom, what is refused, how full the maps are.

    It is one HTML file that needs no network, for a browser, a mail or paper.
    """
    from installer.inspect.report.page import render
    from installer.inspect.report.view import gather
    from installer.inspect.report.writing import write

    if str(path) == "-" and sys.stdout.isatty():
        raise click.UsageError("a page of HTML is not for a terminal: give -o FILE, or redirect the output")
    page = render(gather(attachment.pins, kubernetes_node_name, seconds, proc))
    if str(path) == "-":
        click.echo(page, nl=False)
    else:
        write(path, page)
        click.echo(f"report: {path}")
