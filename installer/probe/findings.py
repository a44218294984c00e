"""The findings of an examination, shown as a table for people and as a document for programs.

NEEDS says which part of sidestep needs which feature of the kernel; docs/kernels.md shows the same table. The kernel
versions in it are for guidance only: verdicts never depend on them.
"""

import os
import sys
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, TextIO

from bpf.errors import SidestepError


class Presence(StrEnum):
    """Whether something needed is there, in the order in which an operator should read the rows."""

    NO = "no"
    UNKNOWN = "unknown"  # it could not be tried
    WARNING = "warning"  # capture works without it
    YES = "yes"


_PLAIN_WIDTH = 120  # columns if the output is not a terminal
# titles and least widths: the longest words of the rows that are always there fit, and the table fits 80 columns
_COLUMNS = (("what", 17), ("needed by", 16), ("found", 10), ("verdict", 7), ("what to do", 10))
_COLOURS = {Presence.YES: "green", Presence.NO: "bold red", Presence.UNKNOWN: "magenta", Presence.WARNING: "yellow"}


class NodeUnfit(SidestepError):
    """Capture would not work on this node. The message names what is wrong and shows the table."""


@dataclass(frozen=True)
class Finding:
    """One examined thing: a row of the table."""

    what: str
    needed_by: str
    found: str
    verdict: Presence
    advice: str = ""  # what to do; empty if nothing needs doing


@dataclass(frozen=True)
class Need:
    """Why sidestep needs a feature of the kernel."""

    label: str  # the feature's name for operators
    needed_by: str
    since: str  # the first Linux that has everything that our program of this name uses


_ACCEPTED = "accepting redirected connections"
_DNS = "DNS capture"
# keys: kinds of maps, hooks of programs, and other features
NEEDS = {
    "hash": Need("map: hash", "pods, ports, addresses", "4.6"),
    "lru_hash": Need("map: lru_hash", "original destinations", "4.10"),
    "lpm_trie": Need("map: lpm_trie", "address ranges", "4.11"),
    "array": Need("map: array", "upgrades", "3.19"),
    "prog": Need("map: prog", "inbound capture", "4.2"),
    "percpu_hash": Need("map: percpu_hash", "metrics by pod", "4.6"),
    "percpu_array": Need("map: percpu_array", "metrics", "4.6"),
    "sockhash": Need("map: sockhash", "inbound capture", "5.7"),
    "sk_storage": Need("map: sk_storage", "outbound capture", "5.2"),
    "ringbuf": Need("map: ringbuf", "sidestep trace", "5.8"),
    "sock_create": Need("sock_create", "telling proxy and application apart", "5.9"),
    "connect4": Need("connect4", "outbound capture, IPv4", "5.7"),
    "connect6": Need("connect6", "outbound capture, IPv6 and mapped IPv4", "5.7"),
    "post_bind4": Need("post_bind4", "inbound capture: the proxy's listeners", "5.9"),
    "post_bind6": Need("post_bind6", "inbound capture: the proxy's listeners", "5.9"),
    "sendmsg4": Need("sendmsg4", _DNS, "5.7"),
    "sendmsg6": Need("sendmsg6", _DNS, "5.7"),
    "recvmsg4": Need("recvmsg4", _DNS, "5.3"),
    "recvmsg6": Need("recvmsg6", _DNS, "5.3"),
    "getpeername4": Need("getpeername4", "applications that ask for their peer", "5.8"),
    "getpeername6": Need("getpeername6", "applications that ask for their peer", "5.8"),
    "sockops": Need("sockops", f"{_ACCEPTED}; inbound capture", "5.15"),
    "getsockopt": Need("getsockopt", "SO_ORIGINAL_DST for the proxy", "5.15"),
    "steer": Need("steer", "inbound capture", "5.9"),
    "sk_lookup": Need("sk_lookup", "inbound capture", "5.9"),
    "bpf_link": Need("bpf_link", "attaching and upgrading in place", "5.7"),
    "SO_NETNS_COOKIE": Need("SO_NETNS_COOKIE", "naming pods", "5.14"),
    "pidfd_getfd": Need("pidfd_getfd", "adopting running pods", "5.6"),
}
MINIMUM = "5.15"  # the highest version in NEEDS


def finding_of(name: str, problem: str) -> Finding:
    """The row for a feature in NEEDS; `problem` says what is wrong, empty if the feature works."""
    need = NEEDS[name]
    if not problem:
        return Finding(need.label, need.needed_by, "works", Presence.YES)
    versions = f"Linux {need.since} or newer ({MINIMUM} for all of sidestep)"
    advice = f"use a kernel that has it: {versions}, with BPF and cgroups configured"
    return Finding(need.label, need.needed_by, problem, Presence.NO, advice)


@dataclass(frozen=True)
class Findings:
    """The rows of an examination, in the order in which they were examined."""

    rows: tuple[Finding, ...]

    @property
    def worst_first(self) -> list[Finding]:
        """The rows in the order of the table: missing things come first."""
        return sorted(self.rows, key=lambda row: list(Presence).index(row.verdict))

    @property
    def works(self) -> bool:
        """Whether capture will work. False if something needed could not be tried."""
        return all(row.verdict in (Presence.YES, Presence.WARNING) for row in self.rows)

    @property
    def warnings(self) -> list[Finding]:
        """The rows about things that capture works without."""
        return [row for row in self.rows if row.verdict is Presence.WARNING]

    @property
    def summary(self) -> str:
        """The result in one sentence."""
        counts = {verdict: sum(row.verdict is verdict for row in self.rows) for verdict in Presence}
        if self.works:
            warnings = counts[Presence.WARNING]
            return "capture will work" + (f", with {warnings} warning{'s'[: warnings > 1]}" if warnings else "")
        told = [
            f"{counts[v]} {word}" for v, word in ((Presence.NO, "missing"), (Presence.UNKNOWN, "unknown")) if counts[v]
        ]
        return f"capture will not work here: of {len(self.rows)} things needed, {', '.join(told)}"

    def document(self) -> dict[str, Any]:
        """The findings as a document for JSON and YAML."""
        rows = [{**asdict(row), "verdict": str(row.verdict)} for row in self.worst_first]
        return {"works": self.works, "summary": self.summary, "rows": rows}

    def table(self, stream: TextIO | None = None) -> str:
        """The table and the summary as text for `stream` (default: stdout): coloured on a terminal, else plain."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        stream = stream or sys.stdout
        terminal = stream.isatty()
        console = Console(file=stream, width=None if terminal else plain_width())
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        advised = any(row.advice for row in self.rows)
        for title, least in _COLUMNS if advised else _COLUMNS[:-1]:
            table.add_column(title, min_width=least, overflow="fold")
        for row in self.worst_first:
            verdict = Text(row.verdict, style=_COLOURS[row.verdict])
            table.add_row(Text(row.what), Text(row.needed_by), Text(row.found), verdict, *[Text(row.advice)][:advised])
        with console.capture() as captured:
            console.print(table)
            console.print(Text(self.summary, style="bold"))
        lines = captured.get().splitlines()
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def require(self) -> None:
        """Raise NodeUnfit unless capture will work."""
        bad = [f"{row.what} {row.found}" for row in self.rows if row.verdict is Presence.NO]
        bad = bad or [f"{row.what} {row.found}" for row in self.rows if row.verdict is Presence.UNKNOWN]
        if not self.works:
            raise NodeUnfit(f"this node can't capture: {'; '.join(bad)}\n{self.table(sys.stderr)}".rstrip())


def plain_width() -> int:
    """Columns if the output is not a terminal: the environment's COLUMNS, else a width that suits most tables."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else _PLAIN_WIDTH
