"""The chart, without Helm: what is written from its schema is up to date, and its values are what they should be."""

import json
from typing import Any

import jsonschema
import pytest
import yaml

from bpf.layout import LEVELS
from docs import chart
from installer import VERSION
from installer.settings import Acceleration, Following, Node, Repair, Shadow
from tests.chart.base import BASE, is_current

MANIFESTS = chart.CHART.parents[1]
# Istio's chart istio-cni of 1.32; where the two differ, a platform or the agent chooses an empty value
ISTIOS = (
    "hub",
    "tag",
    "variant",
    "image",
    "pullPolicy",
    "logging.level",
    "cniBinDir",
    "cniConfDir",
    "cniConfFileName",
    "cniNetnsDir",
    "istioOwnedCNIConfig",
    "istioOwnedCNIConfigFileName",
    "excludeNamespaces",
    "affinity",
    "daemonSetLabels",
    "podAnnotations",
    "podLabels",
    "chained",
    "provider",
    "ambient.enabled",
    "ambient.enablementSelectors",
    "ambient.configDir",
    "ambient.dnsCapture",
    "ambient.ipv6",
    "ambient.reconcileIptablesOnStartup",
    "ambient.shareHostNetworkNamespace",
    "ambient.enableAmbientDetectionRetry",
    "repair.enabled",
    "repair.hub",
    "repair.tag",
    "repair.labelPods",
    "repair.deletePods",
    "repair.repairPods",
    "repair.initContainerName",
    "repair.brokenPodLabelKey",
    "repair.brokenPodLabelValue",
    "seccompProfile",
    "seLinuxOptions",
    "useAppArmorAnnotation",
    "resources",
    "resourceQuotas.enabled",
    "resourceQuotas.pods",
    "tolerations",
    "updateStrategy",
    "terminationGracePeriodSeconds",
    "revision",
    "ownerName",
    "env",
    "profile",
    "platform",
    "compatibilityVersion",
    "global.hub",
    "global.tag",
    "global.variant",
    "global.imagePullPolicy",
    "global.imagePullSecrets",
    "global.logging.level",
    "global.logAsJson",
    "global.defaultResources",
    "global.platform",
    "global.nativeNftables",
    "global.networkPolicy.enabled",
    "global.resourceScope",
)
SAME = {
    **{name: "" for name in ("hub", "tag", "variant", "pullPolicy", "logging.level", "cniConfFileName", "revision")},
    **{name: "" for name in ("ownerName", "istioOwnedCNIConfigFileName", "global.variant", "global.imagePullPolicy")},
    **{name: {} for name in ("affinity", "daemonSetLabels", "podAnnotations", "podLabels", "env")},
    **{name: {} for name in ("seccompProfile", "seLinuxOptions")},
    "istioOwnedCNIConfig": False,
    "excludeNamespaces": ["kube-system"],
    "ambient.enabled": False,
    "repair.enabled": True,
    "repair.labelPods": False,
    "repair.deletePods": False,
    "repair.repairPods": True,
    "repair.initContainerName": "istio-validation",
    "repair.brokenPodLabelKey": "cni.istio.io/uninitialized",
    "repair.brokenPodLabelValue": "true",
    "resourceQuotas.pods": 5000,
    "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
    "terminationGracePeriodSeconds": 30,
    "global.imagePullSecrets": [],
    "global.logging.level": "info",
    "global.logAsJson": False,
    "global.nativeNftables": False,
    "global.networkPolicy.enabled": False,
    "global.resourceScope": "all",
}


def described(name: str) -> dict[str, Any]:
    """What the schema says of a value. Raises KeyError if the chart does not know it."""
    found: dict[str, Any] = chart.schema()
    for part in name.split("."):
        found = found["properties"][part]
    return found


def test_the_values_and_their_page_are_up_to_date() -> None:
    assert chart.VALUES.read_text() == chart.values(), "run `make docs` and commit the chart's values.yaml"
    assert chart.PAGE.read_text() == chart.page(), "run `make docs` and commit docs/helm.md"


def test_the_kustomize_base_is_rendered_from_the_chart_as_it_is() -> None:
    content = BASE.read_text()
    assert is_current(content), "run `make chart` and commit manifests/base"
    assert not is_current(content.replace("hostPID: true", "hostPID: false"))


def test_the_chart_has_the_version_of_the_program() -> None:
    document = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert (document["version"], document["appVersion"]) == (VERSION, VERSION)


def test_the_default_values_fit_the_schema_and_others_do_not() -> None:
    schema = chart.schema()
    jsonschema.Draft7Validator.check_schema(schema)
    defaults = yaml.safe_load(chart.VALUES.read_text())
    jsonschema.validate(defaults, schema, jsonschema.Draft7Validator)
    with pytest.raises(jsonschema.ValidationError, match="'cniBinDri' was unexpected"):
        jsonschema.validate({**defaults, "cniBinDri": "/x"}, schema, jsonschema.Draft7Validator)


@pytest.mark.parametrize("name", ISTIOS)
def test_a_value_of_istios_chart_is_known_here(name: str) -> None:
    assert described(name)


@pytest.mark.parametrize("name", SAME)
def test_a_default_of_istios_chart_is_the_default_here(name: str) -> None:
    assert name in ISTIOS
    assert described(name)["default"] == SAME[name]


def test_defaults_of_our_own_are_the_agents() -> None:
    assert described("acceleration")["default"] == Acceleration().acceleration
    assert described("acceleration")["enum"] == [str(each) for each in LEVELS]
    assert described("livePolicy")["default"] == Following().live_policy
    assert described("shadow")["default"] == Shadow().shadow
    assert described("agentTimeoutSeconds")["default"] == Node().agent_timeout_seconds
    assert described("reconcileSeconds")["default"] == Repair().reconcile_seconds


def test_nothing_that_is_applied_has_a_label_by_which_istioctl_prunes() -> None:
    for path in MANIFESTS.rglob("*"):
        if path.is_file() and path.name != "refusals.yaml":
            for line in path.read_text().splitlines():
                if "operator.istio.io/" in line:
                    assert line.lstrip("{- ").startswith(("#", "/*")), f"{path}: {line}"


def test_every_platform_of_the_schema_has_its_file() -> None:
    platforms = chart.schema()["definitions"]["platform"]["enum"]
    assert sorted(platforms) == sorted(["", *(each.stem for each in (chart.CHART / "platforms").glob("*.yaml"))])


def test_the_hub_says_what_the_chart_is() -> None:
    annotations = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())["annotations"]
    assert json.loads(annotations["artifacthub.io/operator"]) is False
    changes = yaml.safe_load(annotations["artifacthub.io/changes"])
    assert {each["kind"] for each in changes} <= {"added", "changed", "deprecated", "removed", "fixed", "security"}
