"""What the chart renders to: valid, and what the kustomize base and its overlays are too."""

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from installer.pods.resource import DAEMONSET, SHADOW_DAEMONSET
from tests.agent.test_manifests import BUILDS, FOREIGN, MANIFESTS, build
from tests.chart.base import BASE, rendered
from tests.chart.helm import CHART, VERSIONS, document, helm, template, template_text
from tests.lab.node import REPOSITORY

PLATFORMS = ("", "gke", "k3d", "k3s", "microk8s", "minikube", "openshift")
# istioctl prunes by the first, Istio's operator by the second
PRUNED = ("operator.istio.io/component", "install.operator.istio.io/owning-resource")
MUCH: dict[str, Any] = {
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    "daemonSetLabels": {"team": "mesh"},
    "podLabels": {"team": "mesh"},
    "podAnnotations": {"team": "mesh"},
    "seLinuxOptions": {"type": "spc_t"},
    "resourceQuotas": {"enabled": True},
    "provider": "multus",
    "revision": "canary",
    "env": {"TZ": "UTC"},
    "global_": {"networkPolicy": {"enabled": True}, "imagePullSecrets": ["registry"], "platform": "gke"},
}


def named(objects: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    found = {(each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects)
    return {name: in_order(each) for name, each in found.items()}


def in_order(part: Any) -> Any:
    """With lists of named things by their names: a patch of kustomize puts those that it changes first."""
    if isinstance(part, dict):
        return {name: in_order(value) for name, value in part.items()}
    if isinstance(part, list):
        return sorted(map(in_order, part), key=lambda each: each.get("name", "") if isinstance(each, dict) else "")
    return part


def test_helm_has_nothing_to_say_of_the_chart() -> None:
    done = helm("lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout
    assert "1 chart(s) linted, 0 chart(s) failed" in done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_is_valid_for_kubernetes(platform: str, version: str) -> None:
    require_valid(template(version, global_={"platform": platform}), version)


@pytest.mark.parametrize("version", ["1.25", "1.29", "1.30", *VERSIONS])
def test_everything_at_once_is_valid_for_kubernetes(version: str) -> None:
    kinds = require_valid(template(version, **MUCH), version)
    assert kinds == {
        *("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "DaemonSet"),
        *("ResourceQuota", "NetworkPolicy", "NetworkAttachmentDefinition"),
    }


def require_valid(objects: list[dict[str, Any]], version: str) -> set[str]:
    assert len(objects) >= 6
    for each in objects:
        if each["kind"] not in FOREIGN:
            kubernetes_validate.validate(each, version, strict=True)
    return {each["kind"] for each in objects}


def test_the_base_is_the_chart_without_values() -> None:
    assert BASE.read_text() == rendered(), "run `make chart` and commit manifests/base"
    assert named(build(MANIFESTS / "base")) == named(template())


@pytest.mark.parametrize("overlay", [each for each in BUILDS if each != "base"])
def test_an_overlay_is_the_chart_for_that_platform(overlay: str) -> None:
    values: dict[str, Any] = {"global_": {"platform": overlay.removeprefix("overlays/")}}
    assert named(build(MANIFESTS / overlay)) == named(template(**values))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_shadow_mode_has_names_and_labels_of_its_own(platform: str) -> None:
    values = MUCH | {"global_": {**MUCH["global_"], "platform": platform}}
    objects = template(**values, shadow=True)
    require_valid(objects, "1.36")
    assert not named(objects).keys() & named(template(**values)).keys()
    for each in objects:
        assert each["metadata"]["name"].startswith("sidestep-shadow")
        assert each["metadata"]["labels"]["app"] == "sidestep-shadow"
        for part in (*each.get("subjects", ()), *([each["roleRef"]] if "roleRef" in each else ())):
            assert part["name"] in ("sidestep-shadow", "system:openshift:scc:privileged")
    (daemonset,) = (each for each in objects if each["kind"] == "DaemonSet")
    pods = daemonset["spec"]["template"]
    assert daemonset["metadata"]["name"] == SHADOW_DAEMONSET
    assert daemonset["spec"]["selector"] == {"matchLabels": {"k8s-app": SHADOW_DAEMONSET}}
    assert pods["metadata"]["labels"]["k8s-app"] == SHADOW_DAEMONSET
    assert pods["spec"]["serviceAccountName"] == "sidestep-shadow"
    environment = {each["name"]: each.get("value") for each in pods["spec"]["containers"][0]["env"]}
    assert environment["SIDESTEP_DAEMONSET"] == SHADOW_DAEMONSET
    (policy,) = (each for each in objects if each["kind"] == "NetworkPolicy")
    assert policy["spec"]["podSelector"] == daemonset["spec"]["selector"]


def test_shadow_mode_may_read_its_own_daemonset_and_look_at_istios() -> None:
    (role,) = (each for each in template(shadow=True) if each["kind"] == "Role")
    assert [(each["resourceNames"], each["verbs"]) for each in role["rules"]] == [
        ([SHADOW_DAEMONSET], ["get", "list", "watch"]),
        ([DAEMONSET], ["get"]),
    ]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_istioctl_finds_nothing_to_prune(platform: str) -> None:
    values = MUCH | {"global_": {"platform": platform}}
    for each in (*template(**values), *template(**values, shadow=True)):
        labels = each["metadata"].get("labels", {}) | each.get("spec", {}).get("template", {}).get("metadata", {}).get(
            "labels", {}
        )
        assert not set(labels) & set(PRUNED)


def test_the_package_has_all_that_is_rendered(tmp_path: Any) -> None:
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.iterdir()
    assert package.name == f"sidestep-{yaml.safe_load((CHART / 'Chart.yaml').read_text())['version']}.tgz"
    values: dict[str, Any] = {"global_": {"platform": "openshift"}}
    packaged = helm(
        *("template", "sidestep", package, "--namespace", "istio-system", "--kube-version", "1.36.0", "--values", "-"),
        given=document(**values),
    )
    assert packaged.stdout == template_text(**values)


def test_notes_say_what_to_do_next_and_what_has_no_effect(tmp_path: Any) -> None:
    def notes(**values: Any) -> str:
        argv = ("install", "sidestep", CHART, "--dry-run=client", "--namespace", "istio-system", "--values", "-")
        done = helm(*argv, given=document(**values))
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("NOTES:\n")[2]

    plain = notes()
    assert "helm upgrade --install istiod istio/istiod -n istio-system --set pilot.cni.enabled=true\n" in plain
    assert "the image sidestep:" in plain and "names no registry" in plain
    assert "has no effect" not in plain and "have no effect" not in plain
    shadow = notes(shadow=True)
    assert f"kubectl exec -n istio-system daemonset/{SHADOW_DAEMONSET} -- sidestep shadow\n" in shadow
    assert "istio-cni-node" not in shadow and "pilot.cni" not in shadow
    full = notes(image="registry/sidestep:1", provider="multus", repair={"tag": "1"}, global_={"nativeNftables": True})
    assert "--set pilot.cni.enabled=true --set pilot.cni.provider=multus\n" in full
    assert "registry" not in full.partition("2. ")[2].partition("global")[0]
    assert "global.nativeNftables has no effect here" in full
    assert "repair.hub and repair.tag have no effect" in full


def test_commands_of_the_notes_and_the_docs_are_the_same() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    (command,) = re.findall(
        r"^ +(helm upgrade --install istiod .*)$", (CHART / "templates/NOTES.txt").read_text(), re.M
    )
    assert command in page
