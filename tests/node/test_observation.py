"""What kubelet and Prometheus get to hear from a real agent."""

import json
import re
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.lab.curl import REFUSED
from tests.lab.node import Node
from tests.lab.pod import APP_TCP_PORT
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh


def port(node: Node, name: str) -> int:
    """Where the agent said that it serves."""
    return node.agent.port(name)


def scrape(node: Node) -> dict[tuple[str, ...], float]:
    """Name and label values → value."""
    with urlopen(f"http://127.0.0.1:{port(node, 'metrics')}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value for sample in samples}


def test_connections_are_counted_by_what_became_of_them(mesh: Mesh) -> None:
    name = "sidestep_connections_total"
    before = scrape(mesh.node)
    for _ in range(5):
        assert mesh.alpha.curl(mesh.beta.ip4, APP_TCP_PORT).pod == "beta"
    mesh.beta.envoy.stop()
    assert mesh.gamma.curl(mesh.beta.ip4).exit_code == REFUSED
    mesh.beta.envoy.start()
    assert mesh.alpha.curl("127.0.0.1").pod == "alpha"
    after = scrape(mesh.node)

    def more(direction: str, verdict: str) -> float:
        return after[name, direction, verdict] - before[name, direction, verdict]

    assert more("outbound", "captured") == 5
    assert more("inbound", "captured") == 5
    assert more("inbound", "refused") == 1
    assert more("outbound", "direct") >= 1
    assert after["sidestep_lost_handovers_total",] == 0


def test_the_node_is_described(mesh: Mesh) -> None:
    found = scrape(mesh.node)
    assert found[("sidestep_pods",)] == 2
    assert found[("sidestep_attached",)] == 1
    assert found["sidestep_map_entries", "pods"] <= found["sidestep_map_max_entries", "pods"]
    assert found["sidestep_cni_requests_total", "OK", "ADD"] == 3
    assert found["sidestep_cni_request_duration_seconds_count", "ADD"] == 3
    assert found["istio_cni_plugin_requests_total", "200"] == 3
    assert found["sidestep_enrolments_total", "enrolled"] == 2
    assert found["sidestep_enrolments_total", "not_in_mesh"] == 1
    assert found["sidestep_enrolments_total", "failed"] == 0
    assert found[("process_resident_memory_bytes",)] > 0


@pytest.mark.claim("Only the reason in a 503 can contain names of Pods")
def test_no_port_tells_which_pods_there_are(mesh: Mesh) -> None:
    assert mesh.alpha.curl(mesh.beta.ip4).pod == "beta"
    for name, paths in (("metrics", ["/metrics"]), ("health", ["/healthz", "/readyz"])):
        for path in paths:
            with urlopen(f"http://127.0.0.1:{port(mesh.node, name)}{path}", timeout=5) as answer:
                text = answer.read().decode()
            told = [each for pod in (mesh.alpha, mesh.beta, mesh.gamma) for each in (pod.name, pod.uid, str(pod.ip4))]
            assert not [each for each in told if re.search(rf"\b{re.escape(each)}\b", text)]


def test_totals_never_fall(mesh: Mesh) -> None:
    name = "sidestep_connections_total"
    extra = mesh.node.pod("extra")
    assert extra.curl(mesh.beta.ip4).pod == "beta"
    before = scrape(mesh.node)
    extra.stop()
    mesh.node.agent.kill()
    mesh.node.agent.start()
    after = scrape(mesh.node)
    assert all(after[key] >= value for key, value in before.items() if key[0] == name)


def test_health_and_readiness_are_told_apart(mesh: Mesh) -> None:
    base = f"http://127.0.0.1:{port(mesh.node, 'health')}"
    for path in ("/healthz", "/readyz"):
        with urlopen(base + path, timeout=5) as answer:
            assert json.load(answer) == {"status": "ok"}
    with pytest.raises(HTTPError) as unknown:
        urlopen(f"{base}/other", timeout=5)
    assert unknown.value.code == 404


def test_a_taken_port_is_named(node: Node) -> None:
    taken = port(node, "health")
    with Node() as other:
        other.agent.terminate()
        other.agent.options += ["--health-port", str(taken)]
        with pytest.raises(RuntimeError, match=f"port {taken} for health: Address already in use; choose another"):
            other.agent.start()


def test_while_the_api_server_was_never_there_the_agent_serves_but_is_not_ready(node: Node) -> None:
    node.agent.terminate()
    kubeconfig = node.directory / "kubeconfig"
    cluster = [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}]
    context = [{"name": "x", "context": {"cluster": "c", "user": "u"}}]
    users = [{"name": "u", "user": {"token": "t"}}]
    whole = {"kind": "Config", "clusters": cluster, "contexts": context, "users": users, "current-context": "x"}
    kubeconfig.write_text(json.dumps(whole))
    original = node.agent_source
    node.agent_source = ["--kubeconfig", kubeconfig, "--kubernetes-node-name", "lab"]
    node.agent.start()
    node.agent_source = original

    def missing() -> object:
        try:
            urlopen(f"http://127.0.0.1:{port(node, 'health')}/readyz", timeout=5)
        except HTTPError as error:
            return json.load(error)
        return None

    wait_until(lambda: missing() == {"missing": {"synced": "not yet"}}, "only the API server to be missing", 10)
