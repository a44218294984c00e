"""The whole comparison with Istio's ambient rules, as `make conformance-ambient` makes it."""

from tests.conformance.ambient.configs import CONFIGS
from tests.conformance.ambient.run import run
from tests.conformance.run import Outcome


def test_every_probe_agrees_with_istios_ambient_rules_or_differs_as_intended() -> None:
    outcome = Outcome()
    run(CONFIGS, outcome)
    assert outcome.unintended == []
    assert outcome.mispredicted == []
    assert outcome.misexplained == []
    assert outcome.explained.total() >= outcome.probes > 0
    assert (len(CONFIGS) >= 10, len(outcome.kinds) >= 300) == (True, True)
