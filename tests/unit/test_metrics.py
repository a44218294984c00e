"""What is counted, by the names that Prometheus sees; what the kernel counts is left to tests with a kernel."""

from typing import Any, cast

import pytest

from cni.errors import CniError, Code
from cni.policy.pod import Pod
from cni.protocol import NetworkConfig, Request
from cni.verbs import Verbs
from installer.agent.metrics import Metrics
from installer.host.install import NO_CONF, SUCCESS


@pytest.fixture
def metrics() -> Metrics:
    never = cast(Any, None)  # maps and pins are for the collector, which is not asked here
    return Metrics(never, never, never, never)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    families = metrics.registry.restricted_registry([name]).collect()
    samples = (sample for family in families for sample in family.samples)
    return next((each.value for each in samples if (each.name, each.labels) == (name, labels)), None)


def installs(metrics: Metrics, result: str) -> float | None:
    return value(metrics, "istio_cni_installs_total", result=result)


def test_a_start_that_finds_all_in_place_counts_as_one_installation(metrics: Metrics) -> None:
    for ready in (False, True, True, False, True):
        metrics.set_install_ready(ready)
    assert installs(metrics, SUCCESS) == 1
    assert value(metrics, "istio_cni_install_ready") == 1


def test_a_start_that_installs_is_not_counted_twice(metrics: Metrics) -> None:
    metrics.observe_install(NO_CONF)
    metrics.set_install_ready(False)
    assert installs(metrics, SUCCESS) is None
    metrics.observe_install(SUCCESS)
    metrics.set_install_ready(True)
    assert (installs(metrics, SUCCESS), installs(metrics, NO_CONF)) == (1, 1)
    metrics.observe_install(SUCCESS)  # a repair
    assert installs(metrics, SUCCESS) == 2


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (0, "200"),
        (Code.INVALID_ENVIRONMENT, "400"),
        (Code.INVALID_CONFIG, "400"),
        (Code.TRY_AGAIN_LATER, "500"),
        (Code.INVALID_ANNOTATION, "500"),
        (Code.INTERNAL, "500"),
    ],
)
def test_adds_are_counted_as_istio_counts_them(metrics: Metrics, code: int, status: str) -> None:
    name = "istio_cni_plugin_requests_total"
    metrics.observe_request("DEL", code, 0.001)
    assert value(metrics, name, response_code=status) is None
    metrics.observe_request("ADD", code, 0.001)
    assert value(metrics, name, response_code=status) == 1


class One:
    """A source with one Pod, or with none."""

    def __init__(self, pod: Pod | None) -> None:
        self._pod = pod

    def find(self, namespace: str, name: str, uid: str | None) -> Pod:
        if self._pod is None:
            raise CniError("there is none", code=Code.TRY_AGAIN_LATER)
        return self._pod


def add(metrics: Metrics, pod: Pod | None) -> dict[str, Any] | None:
    never = cast(Any, None)
    request = Request(
        version=1,
        command="ADD",
        container_id="c",
        ifname="eth0",
        netns="",
        args="K8S_POD_NAME=p;K8S_POD_NAMESPACE=n",
        config=NetworkConfig(cniVersion="1.0.0", name="net", type="sidestep-cni"),
    )
    return Verbs(cast(Any, One(pod)), never, never, never, never, observe=metrics.observe_enrolment).run(request, None)


def test_an_add_is_counted_by_what_became_of_the_pod(metrics: Metrics) -> None:
    def counts() -> dict[str, float | None]:
        name = "sidestep_enrolments_total"
        return {each: value(metrics, name, result=each) for each in ("enrolled", "not_in_mesh", "failed")}

    assert counts() == {"enrolled": 0, "not_in_mesh": 0, "failed": 0}
    plain = Pod.model_validate({"metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": [{"name": "app"}]}})
    assert add(metrics, plain) == {"cniVersion": "1.0.0"}
    with pytest.raises(CniError):
        add(metrics, None)
    assert counts() == {"enrolled": 0, "not_in_mesh": 1, "failed": 1}
