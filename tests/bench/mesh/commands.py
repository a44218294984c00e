"""The load generators: their command lines, the files that they want beside them, and what they have said."""

from pathlib import Path

from tests.bench.mesh.measure import Figures, from_h2load, from_iperf3, from_wrk
from tests.bench.mesh.proxies import SERVICES
from tests.bench.mesh.workloads import PING, Generator, Workload

REQUESTS = "requests.log"  # what h2load has to say of each request
_WRK_REPORT, _PING = Path(__file__).with_name("wrk.lua"), "ping"


def generator_files() -> dict[str, bytes]:
    """What has to be in the folder of a load generator, by name."""
    return {_WRK_REPORT.name: _WRK_REPORT.read_bytes(), _PING: b"x" * PING}


def command(
    workload: Workload, host: str, files: Path, seconds: int, way_in: Path | None = None, name: str | None = None
) -> list[str | Path]:
    """What is run. `files` is the folder with generator_files(), `way_in` a unix socket instead of host and port.

    `name` is the Service's, if the host is none that proxies know to be its.
    """
    port = SERVICES[workload.service].port
    url = f"http://{host}:{port}/{workload.path}"
    if workload.generator is Generator.IPERF3:
        size = str(workload.write_size)
        return ["iperf3", "-c", host, "-p", str(port), "-t", str(seconds), "-l", size, "--json"]
    if workload.generator is Generator.WRK:
        headers = ["-H", "Connection: close"] if workload.is_closing else []
        headers += ["-H", f"Host: {name}"] if name else []
        sizes = ["-t1", f"-c{workload.connections}", f"-d{seconds}"]
        return ["wrk", *sizes, *headers, "-s", files / _WRK_REPORT.name, url]
    base = ["-B", f"unix:{way_in}"] if way_in else []
    base += ["-H", f":authority: {name}"] if name else []
    sizes = ["-t1", f"-c{workload.connections}", "-m1", f"-D{seconds}"]
    return ["h2load", *sizes, "-d", files / _PING, "--log-file", files / REQUESTS, *base, url]


def figures_of(workload: Workload, output: str, requests: str) -> Figures:
    """What it has printed, and the content of its log of requests. Raises Unreadable."""
    if workload.generator is Generator.WRK:
        return from_wrk(output)
    if workload.generator is Generator.IPERF3:
        return from_iperf3(output, workload.write_size)
    return from_h2load(output, requests)
