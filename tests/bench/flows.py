"""`make bench-flows`: what it costs a connection that it is counted when it closes.

Captured connections of one process to itself, made and reset as fast as it can, with programs as they are and with
programs that count no connection, in turns. Prints the ratio of the processor's time for one.
"""

import click

from tests.bench.lacking import FLOWS, Connections, paired
from tests.bench.trace import spread
from tests.lab.node import Node


@click.command()
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1), help="Times both sides take turns.")
def bench(rounds: int) -> None:
    """Compare the processor's time of a connection that is counted, and of one that is not."""
    with Node() as node, Connections(node) as connections:
        node.agent.terminate()  # or it would see to it that its own programs are attached
        ratios = paired(node, connections, FLOWS, ("captured",), rounds)["captured"]
    click.echo(f"  a captured connection, made and closed: CPU counted / not: {spread(ratios)}")


if __name__ == "__main__":
    bench()
