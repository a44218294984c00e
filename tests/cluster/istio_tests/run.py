"""One run of a suite on the control plane's host, which reaches nodes and pods; its time is bounded."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.builder import BIN, find_go
from tests.cluster.control_plane import ControlPlane
from tests.cluster.istio_images import HUB, TAG
from tests.cluster.istio_tests.outcomes import Outcomes, outcomes_of, reasons_of
from tests.cluster.istio_tests.suites import Suite

# for the slowest suite on two cores, more than twice
_MINUTES = 45
# of Go, after which it has said which tests were running
_GRACE_SECONDS = 60


@dataclass(frozen=True)
class Run:
    """What became of each test, and what those said last that had something to say."""

    outcomes: Outcomes
    reasons: Mapping[str, str]

    @classmethod
    def of(cls, events: list[str]) -> "Run":
        """From the lines of `go tool test2json`."""
        return cls(outcomes_of(events), reasons_of(events))


class RunFailed(Exception):
    """No test began, or the run did not end: where its log is, and the end of that."""


def run(suite: Suite, control: ControlPlane, log: Path, tests: str = "") -> Run:
    """Run its tests, or those that fit `tests` of -test.run; all that they said is in `log`.

    Raises RunFailed.
    """
    work = control.host.directory / log.stem
    work.mkdir()
    argv = [*_in(suite, control), BIN / suite.package.program.name, *_options(suite, control, work, tests)]
    with log.open("wb") as file:
        command = control.host.command(argv)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(_MINUTES * 60 + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"{suite.name}: Go has not ended it after {_MINUTES} minutes; see {log}") from None
        finally:
            process.kill()  # the tests themselves are the host's, and end with it
    found = Run.of(_events(log))
    if not found.outcomes:
        raise RunFailed(f"{suite.name}: no test began; see {log}:\n{log.read_text(errors='replace')[-2000:]}")
    return found


def _in(suite: Suite, control: ControlPlane) -> list[str | Path]:
    """The environment: kubectl on PATH, the cluster by default, and the package's folder."""
    path = f"PATH={BIN}:{os.environ['PATH']}"
    return ["env", f"--chdir={suite.package.folder()}", path, f"KUBECONFIG={control.kubeconfig}"]


def _options(suite: Suite, control: ControlPlane, work: Path, tests: str) -> list[str]:
    options = {
        "istio.test.kube.config": control.kubeconfig,
        "istio.test.kube.deploy": "false",
        "istio.test.kube.loadbalancer": "false",
        "istio.test.istio.enableCNI": "true",
        "istio.test.hub": HUB,
        "istio.test.tag": TAG,
        "istio.test.pullpolicy": "IfNotPresent",
        "istio.test.IPFamilies": ",".join(suite.families),
        # virtual machines want images of other distributions; the others want an Envoy of Istio's, or none
        "istio.test.skipVM": "true",
        "istio.test.skipWorkloads": "proxyless,sotw",
        # two cores are slower than what the tests were written for
        "istio.test.echo.callTimeout": "20s",
        "istio.test.echo.callConverge": "2",
        "istio.test.maxDumps": "0",
        "istio.test.work_dir": work,
        "test.parallel": "1",
        "test.timeout": f"{_MINUTES}m",
        "test.v": "test2json",
    }
    chosen = {"test.run": tests or suite.tests, "test.skip": "" if tests else suite.skipped}
    return [f"-{name}={value}" for name, value in (options | {k: v for k, v in chosen.items() if v}).items()]


def _events(log: Path) -> list[str]:
    """What `go tool test2json` makes of it, a line each."""
    with log.open("rb") as file:
        told = subprocess.run([find_go(), "tool", "test2json"], stdin=file, capture_output=True, check=True)
    log.with_suffix(".json").write_bytes(told.stdout)
    return told.stdout.decode(errors="replace").splitlines()
