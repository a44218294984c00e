"""Loading one pair with one workload, and what came of it."""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.mesh.cpu import Spent, spent
from tests.bench.mesh.measure import Figures, Unreadable, from_h2load, from_iperf3, from_wrk
from tests.bench.mesh.proxies import SERVICES
from tests.bench.mesh.scenarios import Pair
from tests.bench.mesh.workloads import PING, Generator, Workload

_WRK_REPORT = Path(__file__).with_name("wrk.lua")
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
    (pair.files / "wrk.lua").write_bytes(_WRK_REPORT.read_bytes())
    (pair.files / "ping").write_bytes(b"x" * PING)
    (pair.files / "requests.log").unlink(missing_ok=True)
    cgroups = pair.client.cgroup, pair.server.cgroup
    before, counted = spent(cgroups), pair.traffic()
    process = pair.client.popen(
        _command(pair, workload, seconds),
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
    messages = {key: count - counted[key] for key, count in pair.traffic().items()}
    figures = _figures(pair, workload, output)
    return Sample(number, workload.name, pair.scenario.name, figures, after - before, messages)


def _command(pair: Pair, workload: Workload, seconds: int) -> list[str | Path]:
    port = SERVICES[workload.service].port
    url = f"http://{pair.host}:{port}/{workload.path}"
    if workload.generator is Generator.IPERF3:
        size = str(workload.write_size)
        return ["iperf3", "-c", pair.host, "-p", str(port), "-t", str(seconds), "-l", size, "--json"]
    if workload.generator is Generator.WRK:
        closing = ["-H", "Connection: close"] if workload.is_closing else []
        sizes = ["-t1", f"-c{workload.connections}", f"-d{seconds}"]
        return ["wrk", *sizes, *closing, "-s", pair.files / "wrk.lua", url]
    way = pair.way_in(workload.service)
    base = ["-B", f"unix:{way}"] if way else []
    sizes = ["-t1", f"-c{workload.connections}", "-m1", f"-D{seconds}"]
    body, log = pair.files / "ping", pair.files / "requests.log"
    return ["h2load", *sizes, "-d", body, "--log-file", log, *base, url]


def _figures(pair: Pair, workload: Workload, output: str) -> Figures:
    try:
        if workload.generator is Generator.WRK:
            return from_wrk(output)
        if workload.generator is Generator.IPERF3:
            return from_iperf3(output, workload.write_size)
        return from_h2load(output, (pair.files / "requests.log").read_text())
    except (Unreadable, FileNotFoundError) as error:
        raise Unreadable(f"{pair.scenario.name}, {workload.name}: {error}") from error
