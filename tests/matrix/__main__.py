"""`make matrix`; the last line is `matrix: N of N as expected`."""

import secrets
import sys
import time
from pathlib import Path

import click

from tests.lab.demo import exit_on_signals
from tests.lab.node import REPOSITORY
from tests.matrix.bed import Result, bed
from tests.matrix.building import BUILD, NotBuilt
from tests.matrix.cases import Case, cases, run


def keep(case: Case, result: Result) -> Path:
    """Where all that the client said is now."""
    path = BUILD / "logs" / f"{case.name.replace('/', '-')}.log"
    path.parent.mkdir(exist_ok=True)
    path.write_text(result.log)
    return path.relative_to(REPOSITORY)


@click.command()
@click.option("--only", multiple=True, help="Cases whose names fit, such as 'redis/*/full'; may be repeated.")
@click.option("--seed", type=int, help="Of sizes, pauses and bytes; otherwise one is drawn and printed.")
@click.option("--size", default=8_000_000, show_default=True, help="Bytes of a big transfer.")
@click.option("--rounds", default=1, show_default=True, help="Times to run all, each with the next seed.")
def matrix(only: tuple[str, ...], seed: int | None, size: int, rounds: int) -> None:
    """Real programs through Envoys as istiod configures them, at each level, every byte compared."""
    exit_on_signals()
    wanted = cases(only)
    if not wanted:
        raise click.UsageError(f"--only {' '.join(only)}: there are {', '.join(each.name for each in cases())}")
    first = secrets.randbelow(1_000_000) if seed is None else seed
    began, good, done = time.monotonic(), 0, 0
    try:
        with bed(dict.fromkeys(name for each in wanted for name in each.software.compiled)) as made:
            for number in range(first, first + rounds):
                click.echo(f"matrix: seed {number}, big transfers of {size} bytes")
                for case, result in run(made, wanted, number, size):
                    click.echo(case.line(result))
                    if case.verdict(result):
                        click.echo(f"    all it said: {keep(case, result)}")
                    done += 1
                    good += not case.verdict(result)
    except (NotBuilt, RuntimeError, TimeoutError) as error:
        click.echo(f"matrix: {error}")
    click.echo(f"matrix: {time.monotonic() - began:.0f} s")
    click.echo(f"matrix: {good} of {len(wanted) * rounds} as expected")
    sys.exit(good != len(wanted) * rounds)


if __name__ == "__main__":
    matrix()
