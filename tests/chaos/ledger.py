"""What every request met, and what status said at that time."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SAME_SECOND = 1.0
_INBOUND_SOURCES = ("127.0.0.6", "::6")  # where Envoy dials the application from


class Look(NamedTuple):
    """One look at the status: when it began and ended, and whether it said that the pod's traffic is not covered."""

    began: float
    ended: float
    admits: bool


@dataclass
class Ledger:
    """Collects, and judges at the end. All times are those of time.monotonic()."""

    answers: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    strikes: list[tuple[float, str]] = field(default_factory=list)  # when what was taken away
    looks: list[Look] = field(default_factory=list)

    def judge(self) -> tuple[Counter[str], Counter[str]]:
        """How many requests had which fate; and after which strike how many were in the clear without a word."""
        fates: Counter[str] = Counter()
        unsaid: Counter[str] = Counter()
        for direction, answer in self.answers:
            fate = _fate(direction, answer)
            if fate == "clear":
                fate = "said" if self._was_said(answer) else "unsaid"
                if fate == "unsaid":
                    before = [f"{what} ({when:.1f})" for when, what in self.strikes if when <= answer["ended"]]
                    unsaid[f"{direction}, after {before[-1]}"] += 1
            fates[fate] += 1
        return fates, unsaid

    def _was_said(self, answer: dict[str, Any]) -> bool:
        return any(
            look.admits and look.began <= answer["ended"] + SAME_SECOND and look.ended >= answer["began"] - SAME_SECOND
            for look in self.looks
        )


def _fate(direction: str, answer: dict[str, Any]) -> str:
    if "error" in answer:
        return "refused"
    seen = answer["seen"]
    if direction == "in":
        return "proxy" if seen["peer"] in _INBOUND_SOURCES else "clear"
    return "proxy" if seen["peer_port"] != answer["own_port"] else "clear"  # the proxy's connection has its own port
