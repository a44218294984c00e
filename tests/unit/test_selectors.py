"""Which Pods the repair settings' label and field selectors choose."""

import pytest

from bpf.errors import SidestepError
from cni.policy.pod import Pod
from installer.agent.selectors import Selector

POD = Pod.model_validate(
    {
        "metadata": {"name": "web", "namespace": "shop", "labels": {"app": "web", "tier": "front"}},
        "spec": {"nodeName": "n1"},
        "status": {"phase": "Pending"},
    }
)


@pytest.mark.parametrize(
    ("labels", "fields", "matches"),
    [
        ("", "", True),
        ("app=web", "", True),
        ("app == web , tier", "", True),
        ("app!=web", "", False),
        ("other!=web", "", True),
        ("!app", "", False),
        ("!other", "", True),
        ("tier in (front, back),app", "", True),
        ("tier notin (front, back)", "", False),
        ("other notin (front)", "", True),
        ("other", "", False),
        ("empty=", "", False),
        ("", "metadata.namespace=shop,status.phase!=Running", True),
        ("", "metadata.name=other", False),
        ("app=web", "spec.nodeName=n2", False),
    ],
)
def test_selectors_are_kubectls(labels: str, fields: str, matches: bool) -> None:
    assert Selector.of(labels, fields).matches(POD) is matches


@pytest.mark.parametrize(
    ("labels", "fields", "named"),
    [
        ("app=web,=x", "", r'--repair-label-selectors: "app=web,=x" cannot be understood at "=x"'),
        ("tier in front", "", 'at "tier in front"'),
        ("a b", "", 'at "a b"'),
        ("", "spec.schedulerName=x", r'"spec.schedulerName" cannot be selected by; give FIELD=VALUE .* metadata.name'),
        ("", "metadata.name", r'"metadata.name" cannot be selected by'),
    ],
)
def test_a_selector_that_means_nothing_is_refused_at_the_start(labels: str, fields: str, named: str) -> None:
    with pytest.raises(SidestepError, match=named):
        Selector.of(labels, fields)
