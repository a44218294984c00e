"""A kept run with Istio's plugin stands for another one only if it was of the same things and came to its end."""

import json
from pathlib import Path

import pytest

from tests.cluster.istio_tests.outcomes import Outcome
from tests.cluster.istio_tests.reference import keep, kept
from tests.cluster.istio_tests.suites import select

(PILOT,), (DUAL,) = select("pilot"), select("dual")
_GO = "go1.26"


def _ran(folder: Path, *actions: tuple[str, str]) -> Path:
    log = folder / "pilot-istio-cni.log"
    log.with_suffix(".json").write_text("\n".join(json.dumps({"Test": test, "Action": act}) for test, act in actions))
    return log


def test_the_same_tests_are_not_run_again(tmp_path: Path) -> None:
    log = _ran(tmp_path, ("TestTraffic", "run"), ("TestTraffic", "pass"))
    keep(log, PILOT, "", _GO)
    found = kept(log, PILOT, "", _GO)
    assert found is not None
    assert found.outcomes == {"TestTraffic": Outcome.PASSED}


@pytest.mark.parametrize(("suite", "tests", "go"), [(DUAL, "", _GO), (PILOT, "TestXds", _GO), (PILOT, "", "go1.27")])
def test_others_are(tmp_path: Path, suite: object, tests: str, go: str) -> None:
    log = _ran(tmp_path, ("TestTraffic", "run"), ("TestTraffic", "pass"))
    keep(log, PILOT, "", _GO)
    assert kept(log, suite, tests, go) is None  # type: ignore[arg-type]


def test_a_run_that_did_not_end_is_none(tmp_path: Path) -> None:
    log = _ran(tmp_path, ("TestTraffic", "run"))
    keep(log, PILOT, "", _GO)
    assert kept(log, PILOT, "", _GO) is None


def test_nothing_is_kept_before_the_first_run(tmp_path: Path) -> None:
    assert kept(tmp_path / "pilot-istio-cni.log", PILOT, "", _GO) is None
