"""Processor time: the whole machine's, as the kernel's work on packets may be nobody's, and the pods' beside it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Spent:
    """Seconds of processor time."""

    machine: float  # everything that was not idle, softirqs included
    pods: float  # what the scheduler charged to processes of both pods

    def __sub__(self, before: "Spent") -> "Spent":
        return Spent(self.machine - before.machine, self.pods - before.pods)


def spent(cgroups: tuple[Path, ...]) -> Spent:
    """Since boot, and since the cgroups were made."""
    return Spent(busy(_STAT.read_text()), sum(charged((each / "cpu.stat").read_text()) for each in cgroups))


def busy(stat: str) -> float:
    """Seconds that were neither idle, nor waited for disks, nor taken by a hypervisor (proc(5), stat, cpu)."""
    user, nice, system, _idle, _iowait, irq, softirq = (int(ticks) for ticks in stat.split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS


def charged(stat: str) -> float:
    """Seconds of a cgroup's cpu.stat."""
    usage = next(line.split()[1] for line in stat.splitlines() if line.startswith("usage_usec "))
    return int(usage) / 1e6


def busy_cores(seconds: float) -> float:
    """How many cores are busy now, with things that are not the benchmark."""
    before, began = busy(_STAT.read_text()), time.monotonic()
    time.sleep(seconds)
    return (busy(_STAT.read_text()) - before) / (time.monotonic() - began)
