"""The run with Istio's own plugin, which is the same as long as Istio, the suite, its bed and the chosen tests are."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from tests.cluster.istio_tests.outcomes import unfinished
from tests.cluster.istio_tests.run import Run
from tests.cluster.istio_tests.suites import Suite


def keep(log: Path, suite: Suite, tests: str, compiler: str) -> None:
    """Say of a run that has ended, by its log, what it was of; `compiler` is the version of Go."""
    _mark(log).write_text(_key(suite, tests, compiler))


def kept(log: Path, suite: Suite, tests: str, compiler: str) -> Run | None:
    """The run of that log if it came to its end and was of the same things; None if it wasn't, or if there is none."""
    mark, events = _mark(log), log.with_suffix(".json")
    if not (mark.exists() and events.exists() and mark.read_text() == _key(suite, tests, compiler)):
        return None
    found = Run.of(events.read_text(errors="replace").splitlines())
    return found if found.outcomes and not unfinished(found.outcomes) else None


def _key(suite: Suite, tests: str, compiler: str) -> str:
    of = json.dumps([asdict(suite), tests, suite.package.program.key(compiler)], sort_keys=True, default=dict)
    digest = hashlib.sha256(of.encode())
    # images and gateways of this folder: with another one of them, other tests pass
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _mark(log: Path) -> Path:
    return log.with_suffix(".of")
