"""The whole comparison with Istio's own rules, as `make conformance` makes it."""

from pathlib import Path

from tests.conformance.compare import AMBIENT_INTENDED, IN_NFTABLES_MODE, INTENDED
from tests.conformance.configs import CONFIGS
from tests.conformance.run import Outcome, run

DIFFERENCES = Path(__file__).parents[2] / "docs" / "differences.md"


def test_every_probe_agrees_with_istios_rules_or_differs_as_intended() -> None:
    outcome = Outcome()
    run(CONFIGS, outcome)
    assert outcome.unintended == []
    assert outcome.mispredicted == []
    assert outcome.misexplained == []
    assert outcome.explained.total() >= outcome.probes > 0
    assert (len(CONFIGS) >= 25, len(outcome.kinds) >= 60) == (True, True)


def test_every_intended_difference_is_argued() -> None:
    headings = [line[4:] for line in DIFFERENCES.read_text().splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted({each.reason for each in (*INTENDED, *AMBIENT_INTENDED, IN_NFTABLES_MODE)})
