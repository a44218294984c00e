"""`make istio`: Istio's own integration tests in a real Kubernetes, with Istio's CNI plugin and then with sidestep.

Each suite runs in a cluster of its own for each side. Whatever fails with Istio's plugin too is the bed's: its Envoy is
not Istio's. Everything else must pass.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import click

from tests.cluster.bed import Bed
from tests.cluster.builder import BUILD, BuildFailed, build_all, compiler_version
from tests.cluster.cluster import LOGS, Cluster
from tests.cluster.components import components
from tests.cluster.host import CommandFailed, DaemonEnded, lacking
from tests.cluster.istio_source import source
from tests.cluster.istio_tests import programs
from tests.cluster.istio_tests import reference as reference_run
from tests.cluster.istio_tests.images import make_test_images, never_pull
from tests.cluster.istio_tests.names import pattern_of
from tests.cluster.istio_tests.outcomes import Comparison, Outcome, compare, settle, unfinished
from tests.cluster.istio_tests.run import Run, RunFailed, run
from tests.cluster.istio_tests.sides import SIDES
from tests.cluster.istio_tests.suites import Suite, select
from tests.lab.demo import exit_on_signals

RUNS = BUILD / "istio-logs"  # of each suite's last runs; LOGS has the daemons' of the last cluster
# more than these are no matter of chance
_REPEATED_AT_MOST = 20
_REASON_LETTERS = 300


@click.command()
@click.option("--only", metavar="PATTERN", default="*", help="Run the suites whose names fit, as in a shell: 'pilot'.")
@click.option("--tests", metavar="PATTERN", default="", help="Run tests that fit, as go test -run has it.")
@click.option("--kept", is_flag=True, help="Take the last run with Istio's plugin if it was of the same tests.")
def istio(only: str, tests: str, kept: bool) -> None:
    """Build Istio's tests, run them on both sides, say what differs."""
    try:
        suites = select(only)
    except LookupError as error:
        raise click.BadParameter(str(error), param_hint="--only") from None
    if wrong := lacking():
        sys.exit(f"istio: {wrong}")
    exit_on_signals()
    RUNS.mkdir(parents=True, exist_ok=True)
    try:
        build_all([*components(), *programs.servers(), *_packages(suites)], say=say)
        compared = [compared_on_both(suite, tests, kept) for suite in suites]
    except (BuildFailed, RunFailed, LookupError) as error:
        sys.exit(f"istio: {error}")
    except (CommandFailed, DaemonEnded, TimeoutError) as error:
        sys.exit(f"istio: {error}\nistio: its logs are in {LOGS}")
    passed = sum(each.passed_here for each in compared)
    as_there = sum(len(each.failed_as_there) for each in compared)
    otherwise = sum(len(each.otherwise) for each in compared)
    say(f"{passed} passed, {as_there} failed as with istio-cni, {otherwise} otherwise")
    sys.exit(1 if otherwise else 0)


def _packages(suites: list[Suite]) -> list[programs.Tests]:
    return [package.program for package in dict.fromkeys(suite.package for suite in suites)]


def compared_on_both(suite: Suite, tests: str, may_be_kept: bool) -> Comparison:
    """Run a suite on both sides, tell what differs; what fails here alone is run once more, by itself."""
    ours = list(SIDES)[1]
    there = reference_of(suite, tests, may_be_kept)
    with mesh_of(suite, ours) as bed:
        here = ran(suite, ours, bed, tests)
        found = compare(there.outcomes, here.outcomes)
        if 0 < len(found.otherwise) <= _REPEATED_AT_MOST:
            say(f"{suite.name} with {ours}: repeating {len(found.otherwise)} cases by themselves")
            again = run(suite, bed.control, log_of(suite, f"{ours}-again"), pattern_of(found.otherwise))
            settle(found, again.outcomes)
    tell(suite, found, there, here)
    return found


def reference_of(suite: Suite, tests: str, may_be_kept: bool) -> Run:
    """What became of each test with Istio's plugin. Raises RunFailed."""
    reference, compiler = next(iter(SIDES)), compiler_version()
    log = log_of(suite, reference)
    if may_be_kept and (found := reference_run.kept(log, suite, tests, compiler)):
        say(f"{suite.name} with {reference}: as it ran at {time.ctime(log.stat().st_mtime)}")
        return found
    with mesh_of(suite, reference) as bed:
        found = ran(suite, reference, bed, tests)
    if begun := unfinished(found.outcomes):
        raise RunFailed(f"{suite.name} with {reference} did not come to its end: {', '.join(begun)}")
    reference_run.keep(log, suite, tests, compiler)
    return found


@contextmanager
def mesh_of(suite: Suite, side: str) -> Iterator[Bed]:
    """A cluster with nodes, who captures, istiod and the gateways."""
    began = time.monotonic()
    with Cluster() as cluster:
        bed = Bed.of(cluster)
        bed.start_nodes()
        cluster.import_images(make_test_images(cluster.directory / "test-images", source()))
        never_pull(bed.control.host, source())
        SIDES[side](bed, suite.capture)
        bed.mesh.install(*suite.values)
        for kind in ("ingress", "egress"):
            bed.mesh.install_gateway(kind, *suite.values, suite.gateway(kind))
        say(f"{suite.name} with {side}: the mesh is up after {time.monotonic() - began:.0f} s")
        yield bed


def ran(suite: Suite, side: str, bed: Bed, tests: str) -> Run:
    """What became of each test."""
    began = time.monotonic()
    found = run(suite, bed.control, log_of(suite, side), tests)
    counts = {each: list(found.outcomes.values()).count(each) for each in Outcome}
    told = ", ".join(f"{count} {each}" for each, count in counts.items() if count)
    say(f"{suite.name} with {side}: {told}, with the tests that group others, in {time.monotonic() - began:.0f} s")
    return found


def log_of(suite: Suite, side: str) -> Path:
    """What a run has said."""
    return RUNS / f"{suite.name}-{side}.log"


def tell(suite: Suite, found: Comparison, there: Run, here: Run) -> None:
    """Each case that did not pass on both sides, with what it said, and how many there are."""
    for title, names, each in (
        ("fails with sidestep alone", found.otherwise, here),
        ("failed with sidestep, and passed when it was repeated by itself", found.passed_when_repeated, here),
        ("passes with sidestep alone", found.passed_here_alone, there),
        ("fails with both", found.failed_as_there, here),
        ("fails with istio-cni, and was not tried with sidestep", found.untold, there),
    ):
        for name in names:
            reason = shorten(each.reasons.get(name, "it has not said why"), _REASON_LETTERS, placeholder=" …")
            say(f"{suite.name}: {title}: {name}: {reason}")
    say(f"{suite.name}: {len(found.passed)} passed with both, {len(found.skipped)} skipped with both")


def say(line: str) -> None:
    """One line of progress."""
    click.echo(f"istio: {line}")


if __name__ == "__main__":
    istio()
