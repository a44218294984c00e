"""How transfers go while somebody's cgroup has a memory limit, on cgroup2: counted, and held against plain TCP."""

import subprocess
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.lab.late import CONNECTIONS

MIB = 1 << 20
# MiB below which TCP's own buffers may not fit, 128 KiB a connection: what is lost there is told, and is nobody's fault
JUDGED_FROM = {"application": 12, "proxy": 16}
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


@dataclass(frozen=True)
class Fate:
    """What became of CONNECTIONS transfers at once."""

    who: str  # is limited
    mib: int  # of its limit
    level: str
    complete: int
    killed: int  # processes of the limited cgroup, by the OOM killer

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost."""
        return self.complete == CONNECTIONS and not self.killed


def kill_after(process: Any, stack: ExitStack) -> None:
    """Have it killed at the end of the stack."""
    stack.callback(process.communicate)
    stack.callback(process.kill)


def oom_kills(cgroup: Path) -> int:
    """How many processes of a cgroup the OOM killer has killed so far."""
    events = (line.split() for line in (cgroup / "memory.events").read_text().splitlines())
    return int(dict(events)["oom_kill"])


def worse_than_tcp(fates: Iterable[Fate]) -> list[str]:
    """What was lost at a level where every try over plain TCP has lost nothing."""
    every = list(fates)
    doubtful = {(each.who, each.mib) for each in every if each.level == "off" and not each.is_good}
    lost = [each for each in every if not each.is_good and each.mib >= JUDGED_FROM[each.who]]
    return [_said(each) for each in lost if (each.who, each.mib) not in doubtful]


def table(fates: Iterable[Fate]) -> Iterable[str]:
    """Rows by who is limited and how much: at each level, complete transfers and kills of all tries."""
    every = list(fates)
    for who, mib in dict.fromkeys((each.who, each.mib) for each in every):
        cells = []
        for level in ("off", "proxy", "full"):
            tries = [each for each in every if (each.who, each.mib, each.level) == (who, mib, level)]
            whole = f"{sum(each.complete for each in tries)} of {CONNECTIONS * len(tries)}"
            killed = sum(each.killed for each in tries)
            cells.append((whole + (f", killed {killed} of {len(tries)}" if killed else "")) if tries else "as `off`")
        yield f"| {who} | {mib} | {' | '.join(cells)} |"


def _said(fate: Fate) -> str:
    killed = ", killed" if fate.killed else ""
    return f"{fate.who} with {fate.mib} MiB at {fate.level}: {fate.complete} of {CONNECTIONS}{killed}"
