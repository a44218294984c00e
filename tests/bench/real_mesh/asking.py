"""Loading one pair with one workload, by kubectl, and what came of it."""

from tests.bench.mesh.commands import REQUESTS, command, figures_of
from tests.bench.mesh.cpu import spent
from tests.bench.mesh.load import Sample
from tests.bench.mesh.measure import Unreadable
from tests.bench.mesh.workloads import Generator, Workload
from tests.bench.real_mesh.image import FILES
from tests.bench.real_mesh.pairs import Pair, traffic
from tests.cluster.bed import Bed
from tests.cluster.host import CommandFailed
from tests.lab.waiting import wait_until

_GRACE = 30  # seconds that a load generator may take beyond its time
_SECONDS = 120  # until the proxies have heard of everybody


def ask(bed: Bed, pair: Pair, workload: Workload, seconds: int, number: int) -> Sample:
    """Run the load generator in the client's container. Raises Unreadable when it fails."""
    argv = ["timeout", str(seconds + _GRACE), *map(str, command(workload, pair.host, FILES, seconds))]
    counted, before = traffic(bed, pair), spent(pair.cgroups)
    try:
        output = bed.pods.run(pair.client, *argv)
        after = spent(pair.cgroups)
        is_logged = workload.generator is Generator.H2LOAD
        requests = bed.pods.run(pair.client, "cat", str(FILES / REQUESTS)) if is_logged else ""
        figures = figures_of(workload, output, requests)
    except (CommandFailed, Unreadable) as error:
        raise Unreadable(f"{pair.way}, {workload.name}: {error}") from error
    messages = {key: count - counted[key] for key, count in traffic(bed, pair).items()}
    return Sample(number, workload.name, pair.way, figures, after - before, messages)


def wait_until_answered(bed: Bed, pair: Pair, workload: Workload) -> None:
    """Until a second of this load has no failed request. Raises TimeoutError."""

    def is_answered() -> bool:
        try:
            return not ask(bed, pair, workload, 1, 0).figures.errors
        except Unreadable:
            return False

    wait_until(is_answered, f"{pair.way} to answer {workload.name}", _SECONDS)
