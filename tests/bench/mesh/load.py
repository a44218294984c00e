"""Loading one pair with one workload, and what came of it."""

import subprocess
from dataclasses import dataclass, field

from tests.bench.mesh.commands import REQUESTS, command, figures_of, generator_files
from tests.bench.mesh.cpu import Spent, spent
from tests.bench.mesh.measure import Figures, Unreadable
from tests.bench.mesh.proxies import HOST
from tests.bench.mesh.scenarios import Pair
from tests.bench.mesh.workloads import Generator, Workload

_GRACE = 30.0  # seconds a load generator may take beyond its time


@dataclass(frozen=True)
class Sample:
    """One workload over one pair, once."""

    round: int
    workload: str
    scenario: str
    figures: Figures
    spent: Spent
    messages: dict[str, int] = field(default_factory=dict)  # of both pods, by their fate; none without sidestep


def load(pair: Pair, workload: Workload, seconds: int, number: int) -> Sample:
    """Run the load generator in the client's pod. Raises Unreadable when it fails."""
    # not from the checkout, which may be where the pod's users cannot go
    for name, content in generator_files().items():
        (pair.files / name).write_bytes(content)
    (pair.files / REQUESTS).unlink(missing_ok=True)
    cgroups = pair.client.cgroup, pair.server.cgroup
    before, counted = spent(cgroups), pair.traffic()
    process = pair.client.popen(
        command(workload, pair.host, pair.files, seconds, pair.way_in(workload.service), HOST),
        env=pair.environment(workload.service) if workload.generator is Generator.WRK else None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=seconds + _GRACE)[0]
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise Unreadable(f"{workload.generator} in {pair.scenario.name} does not come to an end") from error
    after = spent(cgroups)
    if not pair.has_shaken_hands(workload.service):
        raise Unreadable(f"{pair.scenario.name}, {workload.name}: the Envoys did not speak mTLS")
    messages = {key: count - counted[key] for key, count in pair.traffic().items()}
    log = pair.files / REQUESTS
    try:
        figures = figures_of(workload, output, log.read_text() if log.exists() else "")
    except Unreadable as error:
        raise Unreadable(f"{pair.scenario.name}, {workload.name}: {error}") from error
    return Sample(number, workload.name, pair.scenario.name, figures, after - before, messages)
