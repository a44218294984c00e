"""`make ends`: how connections end when somebody is killed in the middle of a transfer, at each level."""

from collections import Counter

import click

from bpf.layout import LEVELS
from tests.ends.cutting import CASES, CONNECTIONS, transfers
from tests.lab.demo import exit_on_signals


@click.command()
@click.option("--kills", default=1000, help="Of each kind, at each level.", show_default=True)
@click.option("--seed", default=1, help="Same seed, same moments.", show_default=True)
def ends(kills: int, seed: int) -> None:
    """A table of ends: what the applications that were not killed have seen, connection by connection."""
    exit_on_signals()
    click.echo(f"{kills} kills of each kind at each level; each cuts {CONNECTIONS} connections\n")
    click.echo("| killed | when | level | the writer sees | the reader sees |\n|---|---|---|---|---|")
    with transfers(seed) as running:
        for victim, moment in CASES:
            for level in LEVELS:
                found = running.cut(victim, moment, level, kills)
                click.echo(f"| {victim} | {moment} | {level} | {_said(found.writer)} | {_said(found.reader)} |")


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{end} {count}" for end, count in sorted(counts.items())) or "–"


if __name__ == "__main__":
    ends()
