"""What a cluster operator applies: valid, complete, and true to the settings and metrics that there are."""

import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from bpf import kept
from installer.commands.cli import cli
from installer.pods.resource import SHADOW_DAEMONSET
from installer.settings import (
    Acceleration,
    Ambient,
    Attachment,
    Chain,
    Coverage,
    Following,
    Logging,
    Node,
    Ports,
    Repair,
    Shadow,
    environment_variable,
)

MANIFESTS = Path(__file__).parents[2] / "manifests"
BUILDS = ["base", *(f"overlays/{path.name}" for path in sorted((MANIFESTS / "overlays").iterdir()))]
COMPONENTS = sorted(path.name for path in (MANIFESTS / "components").iterdir())
# of Kubernetes; 1.30 is the first with the field for AppArmor
VERSIONS = ("1.30", "1.36", "1.37")
# not Kubernetes' own
FOREIGN = {"NetworkAttachmentDefinition", "PodMonitor", "PrometheusRule"}
# of each field of the settings one variable; the pod itself says these two
FROM_THE_POD = {"KUBERNETES_NODE_NAME", "POD_NAMESPACE"}
# not of the agent, as it is about agents that are not there: kube-state-metrics
KUBERNETES_SAYS = "kube_daemonset_status_number_unavailable"


def build(directory: Path) -> list[dict[str, Any]]:
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the manifests that a test may edit, with a place for an overlay: kustomize takes no absolute paths."""
    copy = tmp_path / "manifests"
    shutil.copytree(MANIFESTS, copy)
    (copy / "overlays" / "own").mkdir()
    return copy


def own(tree: Path, **content: Any) -> list[dict[str, Any]]:
    """What an operator's own overlay over the base builds to."""
    kustomization = {"resources": ["../../base"], **content}
    (tree / "overlays" / "own" / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return build(tree / "overlays" / "own")


def one(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)


def variables(objects: list[dict[str, Any]]) -> dict[str, str]:
    """The agent's settings: the environment of its container, without what comes from the pod itself."""
    (container,) = one(objects, "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def require_valid(objects: list[dict[str, Any]]) -> None:
    assert len(objects) >= 6
    for each in objects:
        for version in VERSIONS:
            if each["kind"] not in FOREIGN:
                kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("place", BUILDS)
def test_each_build_is_valid_for_kubernetes(place: str) -> None:
    require_valid(build(MANIFESTS / place))


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_is_valid_on_the_base(tree: Path, component: str) -> None:
    require_valid(own(tree, components=[f"../../components/{component}"]))


@pytest.mark.parametrize("place", BUILDS)
def test_istio_finds_the_daemonset_and_the_plugin_its_own_pods(place: str) -> None:
    daemonset = one(build(MANIFESTS / place), "DaemonSet", "istio-cni-node")
    template = daemonset["spec"]["template"]
    assert daemonset["metadata"]["namespace"] == "istio-system"
    assert template["metadata"]["labels"]["k8s-app"] == "istio-cni-node"
    assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    (container,) = template["spec"]["containers"]
    assert container["name"] == "install-cni"
    assert container["securityContext"]["privileged"] is False
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}


@pytest.mark.claim("anything else of the API")
def test_the_agent_may_do_with_the_api_what_the_security_model_says_and_nothing_else() -> None:
    objects = build(MANIFESTS / "base")
    assert one(objects, "ClusterRole", "istio-cni")["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]},
    ]
    (own_daemonset,) = one(objects, "Role", "istio-cni")["rules"]
    assert own_daemonset == {
        "apiGroups": ["apps"],
        "resources": ["daemonsets"],
        "resourceNames": ["istio-cni-node"],
        "verbs": ["get", "list", "watch"],
    }
    bound = [each for each in objects if each["kind"] in ("ClusterRoleBinding", "RoleBinding")]
    assert [each["roleRef"]["name"] for each in bound] == ["istio-cni"] * 2


@pytest.mark.claim("all capabilities dropped but these, and a read-only root")
@pytest.mark.claim("seccomp and AppArmor are unconfined")
@pytest.mark.parametrize("place", BUILDS)
def test_the_container_has_the_capabilities_and_mounts_that_the_security_model_lists(place: str) -> None:
    page = (MANIFESTS.parent / "docs" / "security.md").read_text()
    listed = re.findall(r"^\| ([A-Z_, ]+) \|", page.partition("| capability | for |")[2], re.M)
    spec = one(build(MANIFESTS / place), "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    context = container["securityContext"]
    assert set(context["capabilities"]["add"]) == {name for row in listed for name in row.split(", ")}
    assert context["capabilities"]["drop"] == ["ALL"]
    assert (context["privileged"], context["readOnlyRootFilesystem"]) == (False, True)
    assert context["seccompProfile"] == {"type": "Unconfined"}
    assert spec["hostPID"] is True and not spec.get("hostNetwork")


def test_every_setting_has_its_place_and_no_other_is_there() -> None:
    objects = build(MANIFESTS / "base")
    groups = (Attachment, Node, Chain, Repair, Acceleration, Coverage, Following, Ambient, Shadow, Ports, Logging)
    names = {environment_variable(each) for group in groups for each in fields(group)}
    assert set(variables(objects)) == names - FROM_THE_POD
    (container,) = one(objects, "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]["containers"]
    assert {each["name"] for each in container["env"] if "valueFrom" in each} == FROM_THE_POD


def test_the_agent_starts_without_the_api_server_and_a_changed_setting_rolls_it() -> None:
    objects = build(MANIFESTS / "base")
    (container,) = one(objects, "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]["containers"]
    # kubelet knows all of that of a running pod; for a ConfigMap it would ask, and a changed one would roll nothing
    assert "envFrom" not in container
    assert {next(iter(each["valueFrom"])) for each in container["env"] if "valueFrom" in each} == {"fieldRef"}
    assert "ConfigMap" not in {each["kind"] for each in objects}


@pytest.mark.parametrize("place", BUILDS)
def test_another_namespace_is_everybodys(tree: Path, place: str) -> None:
    objects = own(tree, resources=[f"../../{place}"], namespace="elsewhere")
    for each in objects:
        if not each["kind"].startswith("Cluster"):
            assert each["metadata"]["namespace"] == "elsewhere"
        for subject in each.get("subjects", ()):
            assert subject == {"kind": "ServiceAccount", "name": "istio-cni", "namespace": "elsewhere"}


@pytest.mark.parametrize("place", BUILDS)
def test_the_agent_takes_the_settings_as_they_are(place: str) -> None:
    environment = {**variables(build(MANIFESTS / place)), "SIDESTEP_BPFFS": "/never"}
    done = CliRunner(env=environment).invoke(cli, ["agent", "--kubernetes-node-name", "n", "--help"])
    assert done.exit_code == 0
    done = CliRunner(env=environment).invoke(cli, ["detach"])
    assert "--bpffs /never does not exist; " in str(done.exception)


def test_the_paths_of_the_configuration_are_mounted() -> None:
    objects = build(MANIFESTS / "base")
    data = variables(objects)
    (container,) = one(objects, "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for name in ("SIDESTEP_BPFFS", "CNI_AGENT_RUN_DIR", "SIDESTEP_PROC", "MOUNTED_CNI_BIN_DIR", "MOUNTED_CNI_NET_DIR"):
        assert data[name] in mounts


def test_the_socket_has_the_same_path_on_both_sides() -> None:
    spec = one(build(MANIFESTS / "base"), "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]
    inside = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    outside = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in spec["volumes"]}
    assert inside["run"] == outside["run"] == "/run/sidestep"


def test_bytecode_is_kept_where_the_next_pod_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kept.VARIABLE)
    spec = one(build(MANIFESTS / "base"), "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]
    host = {volume["name"] for volume in spec["volumes"] if "hostPath" in volume}
    mounts = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"] if mount["name"] in host}
    assert str(kept.directory().parent) in mounts


@pytest.mark.parametrize(
    ("component", "rule"),
    [
        ("delete-broken-pods", {"apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]}),
        ("label-broken-pods", {"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]}),
    ],
)
def test_the_right_to_touch_pods_comes_with_the_setting_that_needs_it(
    tree: Path, component: str, rule: dict[str, Any]
) -> None:
    plain = one(build(MANIFESTS / "base"), "ClusterRole", "istio-cni")["rules"]
    assert {verb for each in plain for verb in each["verbs"]} == {"get", "list", "watch", "create", "patch"}
    assert rule not in plain
    objects = own(tree, components=[f"../../components/{component}"])
    assert rule in one(objects, "ClusterRole", "istio-cni")["rules"]
    assert variables(objects)["REPAIR_REPAIR_PODS"] == "false"


def test_gke_admits_pods_of_that_priority() -> None:
    objects = build(MANIFESTS / "overlays" / "gke")
    daemonset = one(objects, "DaemonSet", "istio-cni-node")
    quota = one(objects, "ResourceQuota", "istio-cni-resource-quota")
    assert quota["metadata"]["namespace"] == daemonset["metadata"]["namespace"]
    (scope,) = quota["spec"]["scopeSelector"]["matchExpressions"]
    priority = daemonset["spec"]["template"]["spec"]["priorityClassName"]
    assert scope == {"scopeName": "PriorityClass", "operator": "In", "values": [priority]}
    assert int(quota["spec"]["hard"]["pods"]) >= 5000  # one a node, of the largest cluster that Kubernetes promises


def test_no_build_but_that_of_the_component_has_the_namespace_in_it(tree: Path) -> None:
    for place in BUILDS:
        assert "Namespace" not in {each["kind"] for each in build(MANIFESTS / place)}
    namespace = one(own(tree, components=["../../components/namespace"]), "Namespace", "istio-system")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"


def ports(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the agent listens, and where it is looked for: by kubelet, by Prometheus."""
    data = variables(objects)
    template = one(objects, "DaemonSet", "istio-cni-node")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    probes = [container[name]["httpGet"]["port"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == ["health"] * 3
    return {
        "settings": (int(data["SIDESTEP_HEALTH_PORT"]), int(data["MONITORING_PORT"])),
        "container": tuple(
            next(each["containerPort"] for each in container["ports"] if each["name"] == name)
            for name in ("health", "metrics")
        ),
        "annotation": template["metadata"]["annotations"]["prometheus.io/port"],
    }


def test_the_pod_has_the_ports_of_the_settings(tree: Path) -> None:
    assert ports(build(MANIFESTS / "base")) == {
        "settings": (8000, 15014),
        "container": (8000, 15014),
        "annotation": "15014",
    }
    base = tree / "base" / "sidestep.yaml"
    text = base.read_text()
    setting = 'name: {}\n              value: "{}"'.format
    for name, port, other in (("SIDESTEP_HEALTH_PORT", 8000, 18000), ("MONITORING_PORT", 15014, 15999)):
        text = text.replace(setting(name, port), setting(name, other))
    base.write_text(text)
    changed = {"settings": (18000, 15999), "container": (18000, 15999), "annotation": "15999"}
    assert ports(build(tree / "base")) == changed
    assert ports(build(tree / "overlays" / "gke")) == changed


def test_an_overlay_may_choose_other_ports(tree: Path) -> None:
    chosen = tree / "components" / "chosen-ports"
    chosen.mkdir()
    values = {"SIDESTEP_HEALTH_PORT": "18000", "MONITORING_PORT": "15999"}
    env = [{"name": name, "value": value} for name, value in values.items()]
    patch = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "istio-cni-node"},
        "spec": {"template": {"spec": {"containers": [{"name": "install-cni", "env": env}]}}},
    }
    component = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    (chosen / "kustomization.yaml").write_text(
        yaml.safe_dump({**component, "patches": [{"target": {"kind": "DaemonSet"}, "patch": yaml.safe_dump(patch)}]})
    )
    objects = own(tree, components=["../../components/chosen-ports", "../../components/ports"])
    assert ports(objects) == {"settings": (18000, 15999), "container": (18000, 15999), "annotation": "15999"}


def test_monitoring_brings_who_is_scraped_the_alerts_and_the_dashboard(tree: Path) -> None:
    objects = own(tree, components=["../../components/monitoring"])
    template = one(objects, "DaemonSet", "istio-cni-node")["spec"]["template"]
    monitor = one(objects, "PodMonitor", "sidestep")
    (selected,) = monitor["spec"]["selector"]["matchExpressions"]
    assert template["metadata"]["labels"][selected["key"]] in selected["values"]
    assert SHADOW_DAEMONSET in selected["values"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {each["name"] for each in template["spec"]["containers"][0]["ports"]}
    assert one(objects, "PrometheusRule", "sidestep")["spec"] == rules()["spec"]
    dashboard = one(objects, "ConfigMap", "sidestep-dashboard")
    assert json.loads(dashboard["data"]["sidestep.json"])["uid"] == "sidestep"
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {each["metadata"]["namespace"] for each in (monitor, dashboard)} == {"istio-system"}


def test_an_agent_that_is_not_there_is_alerted_of() -> None:
    alerts = {rule["alert"]: rule["expr"] for group in rules()["spec"]["groups"] for rule in group["rules"]}
    daemonset = one(build(MANIFESTS / "base"), "DaemonSet", "istio-cni-node")["metadata"]["name"]
    # of one node its neighbours' metrics tell nothing, and of none at all nothing would be compared
    assert f'kube_daemonset_status_number_unavailable{{daemonset="{daemonset}"}} > 0' in alerts["SidestepAgentAway"]
    assert alerts["SidestepNoAgent"] == "absent(sidestep_attached)"


def test_pods_that_wait_for_ztunnel_are_alerted_of() -> None:
    alerts = {rule["alert"]: rule["expr"] for group in rules()["spec"]["groups"] for rule in group["rules"]}
    assert alerts["SidestepAmbientPending"] == 'sidestep_ambient_pods{state="pending"} > 0'


def rules() -> dict[str, Any]:
    text = (MANIFESTS / "dashboards" / "rules.yaml").read_text()
    return dict(yaml.safe_load(text))


def exported() -> set[str]:
    """Every name that installer/agent/metrics.py makes, in the form of a query."""
    text = (Path(__file__).parents[2] / "installer" / "agent" / "metrics.py").read_text()
    names = set(re.findall(r'"((?:sidestep|istio_cni|nodeagent)_[a-z_]+)"', text))
    with_suffixes = {name + suffix for name in names for suffix in ("", "_total", "_bucket", "_count", "_sum")}
    return with_suffixes | {"process_resident_memory_bytes", KUBERNETES_SAYS}


def expressions() -> list[str]:
    alerts = [rule["expr"] for group in rules()["spec"]["groups"] for rule in group["rules"]]
    dashboard = json.loads((MANIFESTS / "dashboards" / "sidestep.json").read_text())
    return alerts + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("expression", expressions())
def test_dashboards_and_alerts_ask_only_for_what_there_is(expression: str) -> None:
    asked = set(re.findall(r"\b(?:sidestep|istio_cni|nodeagent|process|kube)_[a-z_]+", expression))
    assert asked
    assert asked <= exported()
