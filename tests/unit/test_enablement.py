"""Which Pods are in ambient mode, by labels of theirs and of their namespaces, and which never are."""

from typing import Any

import pytest

from cni.policy.enablement import DEFAULT, Enablement, InvalidSelectors
from cni.policy.pod import Pod

MODE = "istio.io/dataplane-mode"
AMBIENT = {MODE: "ambient"}


def pod(
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    namespace: str = "shop",
    phase: str = "Running",
    **spec: Any,
) -> Pod:
    metadata = {"name": "app", "namespace": namespace, "labels": labels, "annotations": annotations}
    return Pod.model_validate({"metadata": metadata, "spec": spec, "status": {"phase": phase}})


def expressions(*of_pod: str) -> Enablement:
    listed = ", ".join(f"{{{each}}}" for each in of_pod)
    return Enablement(f"- podSelector: {{matchExpressions: [{listed}]}}")


def is_in(labels: dict[str, str], enablement: Enablement) -> bool:
    return enablement.why_not(pod(labels), {}) is None


@pytest.mark.parametrize(
    ("labels", "namespace", "expected"),
    [
        ({}, {}, False),
        (AMBIENT, {}, True),
        ({}, AMBIENT, True),
        (AMBIENT, AMBIENT, True),
        ({MODE: "none"}, AMBIENT, False),
        ({MODE: "none"}, {}, False),
        ({MODE: "sidecar"}, AMBIENT, True),
        ({}, {MODE: "none"}, False),
        (AMBIENT, {MODE: "none"}, True),
        ({MODE: "Ambient"}, {}, False),
    ],
)
def test_the_default_selectors_choose_as_istios_do(
    labels: dict[str, str], namespace: dict[str, str], expected: bool
) -> None:
    assert (Enablement().why_not(pod(labels), namespace) is None) is expected


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        (pod(AMBIENT, hostNetwork=True), "hostNetwork"),
        (pod(AMBIENT, {"sidecar.istio.io/status": ""}), "sidecar"),
        (pod(AMBIENT, namespace="kube-system"), "namespace kube-system is in exclude_namespaces"),
        (pod(AMBIENT | {"app": "ztunnel"}, namespace="istio-system"), "ztunnel itself"),
        (pod(AMBIENT, phase="Succeeded"), "has ended"),
        (pod(AMBIENT, phase="Failed"), "has ended"),
    ],
)
def test_labels_do_not_bring_in_what_is_never_in_ambient_mode(left_out: Pod, words: str) -> None:
    reason = Enablement(excluded=("kube-system",)).why_not(left_out, AMBIENT)
    assert reason and words in reason


def test_an_app_called_ztunnel_elsewhere_is_a_pod_like_any_other() -> None:
    assert Enablement().why_not(pod(AMBIENT | {"app": "ztunnel"}), {}) is None


def test_a_pod_that_has_not_started_yet_is_chosen() -> None:
    assert Enablement().why_not(pod(AMBIENT, phase="Pending"), {}) is None


def test_operators_choose_as_kubernetes_has_them() -> None:
    one, other, none = {"a": "1"}, {"a": "2"}, {"b": "1"}
    given = {
        "key: a, operator: In, values: ['1', '3']": (True, False, False),
        "key: a, operator: NotIn, values: ['1', '3']": (False, True, True),
        "key: a, operator: Exists": (True, True, False),
        "key: a, operator: DoesNotExist": (False, False, True),
    }
    for text, expected in given.items():
        assert tuple(is_in(each, expressions(text)) for each in (one, other, none)) == expected, text


def test_all_of_a_selector_has_to_match_and_any_of_the_list() -> None:
    both = expressions("key: a, operator: Exists", "key: b, operator: Exists")
    assert is_in({"a": "", "b": ""}, both) and not is_in({"a": ""}, both)
    either = Enablement("- podSelector: {matchLabels: {a: x}}\n- podSelector: {matchLabels: {b: x}}")
    assert is_in({"b": "x"}, either) and not is_in({"c": "x"}, either)


@pytest.mark.parametrize("text", ["- {}", "- podSelector: {}", "- podSelector:\n  namespaceSelector:\n"])
def test_an_empty_selector_matches_all(text: str) -> None:
    assert is_in({}, Enablement(text))


def test_an_empty_list_matches_nothing() -> None:
    assert not is_in(AMBIENT, Enablement("[]"))


def test_only_a_flip_of_the_namespace_selector_concerns_its_pods() -> None:
    enablement = Enablement()
    assert enablement.flips({}, AMBIENT) and enablement.flips(AMBIENT, {})
    assert not enablement.flips(AMBIENT, AMBIENT | {"team": "a"})
    assert not enablement.flips({}, {MODE: "none"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty, not a list; give a YAML list"),
        ("istio.io/dataplane-mode: ambient", "is a mapping, not a list"),
        ("[", "is not YAML"),
        ("- ambient", "[0]: 'ambient': it is not a mapping"),
        ("- podSelectors: {}", "[0].podSelectors: {}: there is no such field"),
        ("- podSelector: {matchLabels: {a: true}}", "[0].podSelector.matchLabels.a: True: it is not a text"),
        ("- podSelector: {matchLabels: {'a b': x}}", "'a b': it is not the key of a label"),
        ("- podSelector: {matchLabels: {A/b: x}}", "'A/b': it is not the key of a label"),
        ("- podSelector: {matchLabels: {a: -x}}", "'-x': it is not the value of a label"),
        ("- namespaceSelector: {matchExpressions: {}}", "[0].namespaceSelector.matchExpressions: {}: it is not a list"),
        (
            "- podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}",
            "[0].podSelector.matchExpressions[0].operator: 'in': it is not an operator; give In, NotIn, Exists or",
        ),
        ("- podSelector: {matchExpressions: [{key: a, operator: In}]}", "In needs values"),
        ("- podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}", "Exists takes no values"),
        ("- podSelector: {matchExpressions: [{operator: Exists}]}", "matchExpressions[0].key: it is missing"),
    ],
)
def test_what_kubernetes_would_not_take_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(InvalidSelectors) as refused:
        Enablement(text)
    message = str(refused.value)
    assert message.startswith("AMBIENT_ENABLEMENT_SELECTOR")
    assert words in message
    assert "\n" not in message


def test_the_default_is_the_list_that_istios_chart_gives() -> None:
    assert MODE in DEFAULT
    assert Enablement(DEFAULT).why_not(pod(AMBIENT), {}) is None
