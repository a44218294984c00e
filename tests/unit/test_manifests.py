"""What a cluster operator applies: valid, complete, and true to the settings and metrics that there are."""

import json
import re
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from installer.cli import cli
from installer.settings import Acceleration, Attachment, Chain, Logging, Node, Ports, Repair, environment_variable

MANIFESTS = Path(__file__).parents[2] / "manifests"
BUILDS = ["base", *(f"overlays/{path.name}" for path in sorted((MANIFESTS / "overlays").iterdir()))]
# not Kubernetes' own
FOREIGN = {"NetworkAttachmentDefinition"}
# of each field of the settings one variable; the pod itself says these two
FROM_THE_POD = {"KUBERNETES_NODE_NAME", "POD_NAMESPACE"}


def build(directory: Path) -> list[dict[str, Any]]:
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def one(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)


@pytest.mark.parametrize("place", BUILDS)
def test_each_build_is_valid_for_kubernetes(place: str) -> None:
    objects = build(MANIFESTS / place)
    assert len(objects) >= 7
    for each in objects:
        if each["kind"] not in FOREIGN:
            kubernetes_validate.validate(each, "1.32", strict=True)


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


def test_every_setting_has_its_place_and_no_other_is_there() -> None:
    objects = build(MANIFESTS / "base")
    data = one(objects, "ConfigMap", "istio-cni-config")["data"]
    groups = (Attachment, Node, Chain, Repair, Acceleration, Ports, Logging)
    names = {environment_variable(each) for group in groups for each in fields(group)}
    assert set(data) == names - FROM_THE_POD
    (container,) = one(objects, "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]["containers"]
    assert {each["name"] for each in container["env"]} == FROM_THE_POD


@pytest.mark.parametrize("place", BUILDS)
def test_the_agent_takes_the_settings_as_they_are(place: str) -> None:
    data = one(build(MANIFESTS / place), "ConfigMap", "istio-cni-config")["data"]
    done = CliRunner(env={**data, "SIDESTEP_BPFFS": "/never"}).invoke(
        cli, ["agent", "--kubernetes-node-name", "n", "--help"]
    )
    assert done.exit_code == 0
    done = CliRunner(env={**data, "SIDESTEP_BPFFS": "/never"}).invoke(cli, ["detach"])
    assert "/never is no bpffs" in str(done.exception)


def test_the_paths_of_the_configuration_are_mounted() -> None:
    objects = build(MANIFESTS / "base")
    data = one(objects, "ConfigMap", "istio-cni-config")["data"]
    (container,) = one(objects, "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for name in ("SIDESTEP_BPFFS", "CNI_AGENT_RUN_DIR", "SIDESTEP_PROC", "MOUNTED_CNI_BIN_DIR", "MOUNTED_CNI_NET_DIR"):
        assert data[name] in mounts


def test_the_socket_has_the_same_path_on_both_sides() -> None:
    spec = one(build(MANIFESTS / "base"), "DaemonSet", "istio-cni-node")["spec"]["template"]["spec"]
    inside = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    outside = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in spec["volumes"]}
    assert inside["run"] == outside["run"] == "/run/sidestep"


@pytest.mark.parametrize(
    ("component", "rule"),
    [
        ("delete-broken-pods", {"apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]}),
        ("label-broken-pods", {"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]}),
    ],
)
def test_the_right_to_touch_pods_comes_with_the_setting_that_needs_it(
    tmp_path: Path, component: str, rule: dict[str, Any]
) -> None:
    plain = one(build(MANIFESTS / "base"), "ClusterRole", "istio-cni")["rules"]
    assert {verb for each in plain for verb in each["verbs"]} == {"get", "list", "watch", "create", "patch"}
    assert rule not in plain
    # beside the others, as kustomize takes no absolute paths
    beside = MANIFESTS / "overlays" / f"test-{tmp_path.parent.name}-{component}"
    beside.mkdir()
    try:
        (beside / "kustomization.yaml").write_text(
            yaml.safe_dump({"resources": ["../../base"], "components": [f"../../components/{component}"]})
        )
        objects = build(beside)
    finally:
        (beside / "kustomization.yaml").unlink(missing_ok=True)
        beside.rmdir()
    assert rule in one(objects, "ClusterRole", "istio-cni")["rules"]
    assert one(objects, "ConfigMap", "istio-cni-config")["data"]["REPAIR_REPAIR_PODS"] == "false"


def exported() -> set[str]:
    """Every name that installer/metrics.py makes, in the form of a query."""
    text = (Path(__file__).parents[2] / "installer" / "metrics.py").read_text()
    names = set(re.findall(r'"((?:sidestep|istio_cni|nodeagent)_[a-z_]+)"', text))
    with_suffixes = {name + suffix for name in names for suffix in ("", "_total", "_bucket", "_count", "_sum")}
    return with_suffixes | {"process_resident_memory_bytes"}


def expressions() -> list[str]:
    rules = yaml.safe_load((MANIFESTS / "dashboards" / "rules.yaml").read_text())
    alerts = [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    dashboard = json.loads((MANIFESTS / "dashboards" / "sidestep.json").read_text())
    return alerts + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("expression", expressions())
def test_dashboards_and_alerts_ask_only_for_what_there_is(expression: str) -> None:
    asked = set(re.findall(r"\b(?:sidestep|istio_cni|nodeagent|process)_[a-z_]+", expression))
    assert asked
    assert asked <= exported()
