"""What the agent does through the API server, and how it gets there."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from installer.pods.access import access_of
from installer.pods.api import Api
from installer.pods.api_errors import ApiFailed, Conflict
from installer.settings import Node
from tests.lab.apiserver import ApiServer
from tests.lab.cluster import World, manifest


def test_a_pod_is_deleted_or_labelled_only_as_it_was_seen(world: World) -> None:
    uid = str(uuid.uuid4())
    world.server.put(manifest("a", uid=uid))
    seen = world.api.get_pod("default", "a")
    assert seen is not None
    world.server.put(manifest("a", uid=uid, annotations={"changed": "meanwhile"}))
    with pytest.raises(Conflict):
        world.api.delete_pod(seen)
    with pytest.raises(Conflict):
        world.api.label_pod(seen, "k", "v")
    now = world.api.get_pod("default", "a")
    assert now is not None
    assert world.api.label_pod(now, "k", "v")
    labelled = world.api.get_pod("default", "a")
    assert labelled is not None
    assert labelled.labels == {"k": "v"}
    assert not world.api.label_pod(labelled, "k", "other")
    assert world.api.delete_pod(labelled)
    assert not world.api.delete_pod(labelled)
    assert world.api.get_pod("default", "a") is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Node(), "KUBERNETES_SERVICE_HOST and _PORT are not set: not in a cluster; give --kubeconfig FILE"),
        (Node(kubeconfig=Path("/never")), "kubeconfig /never: "),
    ],
)
def test_no_way_to_the_api_server_is_said_at_once(settings: Node, said: str) -> None:
    with pytest.raises(ApiFailed, match=said):
        Api.of(settings, lambda verb, status: None)


def test_of_environments_only_the_proxys_is_kept(world: World) -> None:
    made = manifest("a", labels={"env": "prod", "volumes": "many"}, managedFields=[{"manager": "kubelet"}])
    env = [{"name": "DISABLE_ENVOY", "value": "true"}]
    made["spec"] |= {
        "containers": [{"name": "app", "env": env}, {"name": "istio-proxy", "env": env}],
        "initContainers": [{"name": "istio-proxy", "env": env}],
    }
    world.server.put(made)
    pod = world.api.get_pod("default", "a")
    assert pod is not None
    assert pod.labels == {"env": "prod", "volumes": "many"}
    assert [(each.name, each.env_value("DISABLE_ENVOY")) for each in pod.containers] == [
        ("istio-proxy", "true"),
        ("app", None),
        ("istio-proxy", "true"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "kubeconfig .*: "),
        ("users: [", "kubeconfig .*: while parsing a flow"),
        ("[1, 2]", "kubeconfig .*: "),
        ("{current-context: none, contexts: [], users: [], clusters: []}", "kubeconfig .*: .*none"),
    ],
)
def test_a_broken_kubeconfig_is_told_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "kubeconfig").write_text(text)
    with pytest.raises(ApiFailed, match=said) as caught:
        access_of(Node(kubeconfig=tmp_path / "kubeconfig"))
    assert "\n" not in str(caught.value)


def test_a_ca_that_is_not_there_is_told_by_its_name(world: World, tmp_path: Path) -> None:
    with pytest.raises(ApiFailed, match=r"never.crt: no such file; it should hold the API server's CA"):
        access_of(Node(kubeconfig=world.kubeconfig, kube_ca_file=tmp_path / "never.crt"))


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ApiServer]:
    """A server without TLS, as a pod is told of it, and its account."""
    with ApiServer().running() as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", server.address)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        (tmp_path / "token").write_text(server.token)
        yield server


def test_the_servers_protocol_is_what_the_environment_says(
    inside: ApiServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_PROTOCOL", "http")
    inside.put(manifest("a"))
    api = Api(access_of(Node(), tmp_path), lambda verb, status: None)
    assert api.get_pod("default", "a") is not None
    api.close()


@pytest.mark.parametrize("protocol", [None, "", "https"])
def test_a_server_is_reached_by_https_unless_something_else_is_said(
    inside: ApiServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, protocol: str | None
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_PROTOCOL", raising=False)
    if protocol is not None:
        monkeypatch.setenv("KUBERNETES_SERVICE_PROTOCOL", protocol)
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.crt")
    assert access_of(Node(), tmp_path)().host == f"https://{inside.address}:{inside.port}"


@pytest.mark.usefixtures("inside")
def test_a_protocol_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_PROTOCOL", "tcp")
    with pytest.raises(ApiFailed, match=r'KUBERNETES_SERVICE_PROTOCOL: "tcp" is not a protocol .*; give http or https'):
        access_of(Node(), tmp_path)
