"""`sidestep trace --last N`: refused and denied connections from before, as far as the agent has noticed them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bpf.errors import SidestepError
from installer.commands.agent_socket import ask_about
from installer.commands.trace.forms import FORMS
from installer.commands.trace.told_events import outcome_of


class NotKnown(SidestepError):
    """No agent tells what has failed."""


@dataclass(frozen=True)
class Chosen:
    """Which of them are wanted: the last so many, of one pod, verdict or direction (None: of all)."""

    number: int
    pod: str | None
    verdict: str | None
    direction: str | None

    def takes(self, each: dict[str, Any]) -> bool:
        """Whether one is wanted, by its pod's NAMESPACE/NAME or NAME, and the rest."""
        return (
            (self.pod is None or self.pod in (each["pod"], each["pod"].partition("/")[2]))
            and self.verdict in (None, each["verdict"])
            and self.direction in (None, each["direction"])
        )


def show_last(run_dir: Path, chosen: Chosen, output: str) -> None:
    """Print them, the latest last. Raises NotKnown if no agent tells."""
    failed, unknown = ask_about(run_dir, "WHAT_FAILED")
    if unknown:
        raise NotKnown(
            f"only a running agent knows what was refused before: {unknown}; without "
            "--last, the trace shows what happens from now on"
        )
    wanted = [each for each in failed if chosen.takes(each)]
    if not wanted and output in ("table", "wide"):
        click.echo(_nothing(sorted({each["pod"] for each in failed})))
    for each in wanted[-chosen.number :]:
        if output in ("table", "wide"):
            click.echo(_line(each))
        else:
            click.echo(FORMS[output](each), nl=False)


def _nothing(others: list[str]) -> str:
    """That there is none to print. `others` are pods with some that were not asked for, perhaps by mistake."""
    if not others:
        return "nothing was refused or denied since the agent started, as far as it looked"
    names = ", ".join(others)
    return f"nothing of that kind was refused or denied, as far as the agent looked; others were, in {names}"


def _line(each: dict[str, Any]) -> str:
    count = "once" if each["count"] == 1 else f"{each['count']} times"
    outcome = outcome_of(each["direction"], each["verdict"])
    peers = f" ({', '.join(each['peers'])})" if each["peers"] else ""
    return f"{each['at'][:19]}Z {each['pod']}: {each['direction']} {each['verdict']} {count}{peers}: {outcome}"
