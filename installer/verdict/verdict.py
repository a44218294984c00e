"""What a verdict is: findings, each with what to do about it, and the state and exit status that follow from them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# a document of `sidestep status`, or a part of it
Looked = Mapping[str, Any]
_SHOWN = 5  # names in a sentence


class State(StrEnum):
    """How a node is, or what one finding means for it."""

    OK = "ok"
    WRONG = "wrong"
    UNKNOWN = "unknown"  # it can't be looked at, so nobody can call it well
    NOTE = "note"  # of a finding only: worth knowing, and nothing is wrong


@dataclass(frozen=True)
class Finding:
    """One thing that was found. `part` is where: programs, agent, chain and so on. `advice` says what to do."""

    state: State
    part: str
    what: str
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """All findings: faults first, then what can't be told, then notes."""

    findings: tuple[Finding, ...]
    pods: int  # that are enrolled

    @property
    def state(self) -> State:
        """WRONG if anything is; else UNKNOWN if anything can't be told; else OK."""
        states = {each.state for each in self.findings}
        return next((each for each in (State.WRONG, State.UNKNOWN) if each in states), State.OK)

    @property
    def exit_status(self) -> int:
        """0 only if all is well, 1 if something is wrong, 3 if it can't be told."""
        return {State.OK: 0, State.WRONG: 1}.get(self.state, 3)

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        counts = Counter(each.state for each in self.findings)
        wrong, unknown = counts[State.WRONG], counts[State.UNKNOWN]
        if self.state is State.OK:
            return f"OK: {_pods(self.pods)} captured, nothing is wrong"
        if self.state is State.UNKNOWN:
            return f"UNKNOWN: {_things(unknown)} can't be looked at, and nothing else is wrong"
        return f"WRONG: {_things(wrong)}" + (f"; {_things(unknown)} can't be looked at" if unknown else "")

    def advised(self) -> Iterator[tuple[list[Finding], str]]:
        """The findings with their advice; those with the same state and advice together."""
        groups: dict[tuple[State, str], list[Finding]] = {}
        for number, each in enumerate(self.findings):
            groups.setdefault((each.state, each.advice or str(number)), []).append(each)
        yield from ((group, group[0].advice) for group in groups.values())

    def document(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "state": str(self.state),
            "headline": self.headline,
            "findings": [vars(each) | {"state": str(each.state)} for each in self.findings],
        }


def listed(names: list[str]) -> str:
    """Names for a sentence, which has room for a few."""
    few = ", ".join(names[:_SHOWN])
    return f"{few} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else few


def _things(count: int) -> str:
    return "one thing" if count == 1 else f"{count} things"


def _pods(count: int) -> str:
    return "one pod is" if count == 1 else f"{count or 'no'} pods are"
