"""Which Pods belong to the mesh, and which of Istio's reasons comes first."""

from typing import Any

import pytest

from cni.policy.membership import has_sidecar, skip_pod, skip_reason, skip_unseen
from cni.policy.pod import Pod

STATUS = {"sidecar.istio.io/status": ""}
INJECT = "sidecar.istio.io/inject"


def pod(
    *containers: dict[str, Any],
    init: tuple[dict[str, Any], ...] = (),
    annotations: dict[str, str] | None = STATUS,
    labels: dict[str, str] | None = None,
) -> Pod:
    return Pod.model_validate(
        {
            "metadata": {"name": "app", "annotations": annotations, "labels": labels},
            "spec": {"containers": [{"name": "app"}, *containers], "initContainers": list(init)},
        }
    )


def proxy(*args: str, **env: str) -> dict[str, Any]:
    return {
        "name": "istio-proxy",
        "args": list(args),
        "env": [{"name": name, "value": value} for name, value in env.items()],
    }


def inject(annotation: str | None, label: str | None) -> Pod:
    annotated = STATUS if annotation is None else STATUS | {INJECT: annotation}
    return pod(proxy(), annotations=annotated, labels=None if label is None else {INJECT: label})


def reason(skipped: Pod) -> str:
    found = skip_reason(skipped)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "args",
    [(), ("proxy",), ("proxy", "sidecar", "--domain", "x"), ("proxy", ""), ("istio-iptables", "router"), ("router",)],
)
def test_an_injected_sidecar_belongs_to_the_mesh(args: tuple[str, ...]) -> None:
    assert skip_reason(pod(proxy(*args))) is None


def test_a_native_sidecar_belongs_to_the_mesh() -> None:
    assert skip_reason(pod(init=(proxy("proxy", "sidecar"),))) is None


def test_a_pod_with_istio_init_is_left_to_it() -> None:
    assert "istio-init" in reason(pod(proxy(), init=({"name": "istio-init"},)))


def test_a_proxy_without_envoy_is_skipped() -> None:
    assert "DISABLE_ENVOY" in reason(pod(proxy(DISABLE_ENVOY="true")))


@pytest.mark.parametrize("value", ["false", "0", "", "yes"])
def test_a_proxy_with_envoy_is_not(value: str) -> None:
    assert skip_reason(pod(proxy(DISABLE_ENVOY=value))) is None


def test_disable_envoy_of_another_container_does_not_count() -> None:
    assert skip_reason(pod(proxy() | {"name": "other"} | {"env": proxy(DISABLE_ENVOY="1")["env"]}, proxy())) is None


def test_a_pod_without_a_proxy_is_skipped() -> None:
    assert "no istio-proxy container" in reason(pod())


@pytest.mark.parametrize("role", ["router", "waypoint"])
def test_gateways_and_waypoints_are_skipped(role: str) -> None:
    assert role in reason(pod(proxy("proxy", role)))


@pytest.mark.parametrize(
    ("annotation", "label", "skipped"),
    [
        ("false", None, True),
        (None, "false", True),
        ("0", None, True),
        ("true", None, False),
        ("false", "true", False),
        ("true", "false", True),
        ("maybe", None, False),
        ("false", "maybe", False),
        ("false", "", False),
        (None, None, False),
    ],
)
def test_injection_turned_off_skips_and_the_label_beats_the_annotation(
    annotation: str | None, label: str | None, skipped: bool
) -> None:
    assert (skip_reason(inject(annotation, label)) is not None) is skipped


def test_a_pod_that_the_injector_has_not_seen_is_skipped() -> None:
    assert "sidecar.istio.io/status" in reason(pod(proxy(), annotations=None))


def test_reasons_come_in_istios_order() -> None:
    """Each step takes the first reason away from a Pod that has them all."""
    gateway, off = proxy("proxy", "router"), {INJECT: "false"}
    without_envoy = proxy("proxy", "router", DISABLE_ENVOY="1")
    init = ({"name": "istio-init"},)
    assert "istio-init" in reason(pod(without_envoy, init=init, annotations=off))
    assert "istio-init" in reason(pod(init=init, annotations=off))
    assert "DISABLE_ENVOY" in reason(pod(without_envoy, annotations=off))
    assert "no istio-proxy" in reason(pod(annotations=off))
    assert "router" in reason(pod(gateway, annotations=off))
    assert "inject is false" in reason(pod(proxy(), annotations=off))
    assert "status" in reason(pod(proxy(), annotations={}))


@pytest.mark.parametrize(
    ("namespace", "name", "reason_given"),
    [
        ("istio-system", "istio-cni-node-x7k2p", "agent's own pod"),
        ("istio-system", "sidestep-shadow-node-x7k2p", "agent's own pod"),
        ("", "", "not a Kubernetes pod"),
        ("default", "", "not a Kubernetes pod"),
        ("kube-system", "coredns", "exclude_namespaces"),
        ("default", "istio-cni-node-x7k2p", None),
        ("istio-system", "istiod-1", None),
        ("default", "app", None),
    ],
)
def test_some_sandboxes_are_skipped_by_name_alone(namespace: str, name: str, reason_given: str | None) -> None:
    given = skip_unseen(namespace, name, "istio-system", ("kube-system",))
    assert (given is None) if reason_given is None else (given is not None and reason_given in given)


def test_the_agents_own_pod_comes_first() -> None:
    given = skip_unseen("istio-system", "istio-cni-node-1", "istio-system", ("istio-system",))
    assert given == "the agent's own pod"


def test_without_a_namespace_of_its_own_the_agent_knows_no_pod_of_its_own() -> None:
    assert skip_unseen("default", "istio-cni-node-1", "", ()) is None


def test_one_function_decides_for_add_reconciliation_repair_and_commands() -> None:
    mesh = pod(proxy())
    assert skip_pod(mesh, "istio-system", ()) is None
    assert "exclude_namespaces" in str(skip_pod(mesh, "istio-system", (mesh.namespace,)))
    on_host = mesh.model_copy(update={"spec": mesh.spec.model_copy(update={"host_network": True})})
    assert "hostNetwork" in str(skip_pod(on_host, "istio-system", ()))
    assert "istio-init" in str(skip_pod(pod(proxy(), init=({"name": "istio-init"},)), "istio-system", ()))


def test_a_sidecar_is_one_whoever_sets_up_its_capture() -> None:
    assert has_sidecar(pod(proxy()))
    assert has_sidecar(pod(proxy(), init=({"name": "istio-init"},)))
    assert not has_sidecar(pod(proxy("proxy", "router")))
    assert not has_sidecar(pod(proxy(DISABLE_ENVOY="true")))
    assert not has_sidecar(pod())
