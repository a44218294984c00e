"""What each value does, and what Helm says of one that the chart does not take."""

from typing import Any

import pytest
import yaml

from installer import VERSION
from tests.chart.helm import refusal, template

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"shadow": True, "ambient": {"enabled": True}}, "shadow: it compares for pods with sidecars"),
    ({"variant": "distroless"}, 'variant: "distroless": there is one image'),
    ({"global_": {"variant": "debug"}}, 'variant: "debug": there is one image'),
    ({"profile": "ambient"}, 'profile: "ambient": sidestep has no profiles'),
    ({"compatibilityVersion": "1.30"}, 'compatibilityVersion: "1.30": sidestep behaves alike'),
    ({"ownerName": "me"}, 'ownerName: "me": istioctl prunes'),
    (
        {"logging": {"level": "default:info,cni:debug"}},
        'logging.level: "default:info,cni:debug": the agent has one level',
    ),
    ({"podLabels": {"operator.istio.io/component": "Cni"}}, "podLabels: istioctl prunes what has the label operator"),
    (
        {"daemonSetLabels": {"install.operator.istio.io/owning-resource": "x"}},
        "daemonSetLabels: istioctl prunes what has the label install",
    ),
    ({"provider": "multus", "chained": True}, "chained: multus calls the plugin by a network of its own"),
    ({"provider": "multus", "istioOwnedCNIConfig": True}, "istioOwnedCNIConfig: there is no chain to copy"),
    ({"env": {"SIDESTEP_ACELERATION": "off"}}, "env: SIDESTEP_ACELERATION is no setting of the agent"),
    (
        {"env": {"SIDESTEP_SHADOW": "true"}},
        "env: SIDESTEP_SHADOW goes with the names of the objects; set",
    ),
    ({"env": {"SIDESTEP_DAEMONSET": "x"}}, "env: SIDESTEP_DAEMONSET goes with the names of the objects"),
    ({"env": {"POD_NAMESPACE": "x"}}, "env: POD_NAMESPACE comes from the pod itself"),
]
# what Helm itself says, by the schema
MISTAKEN: list[tuple[dict[str, Any], str]] = [
    ({"cniBinDri": "/x"}, "additional properties 'cniBinDri' not allowed"),
    ({"repair": {"enable": True}}, "at '/repair': additional properties 'enable' not allowed"),
    ({"global_": {"platform": "gek"}}, "at '/global/platform': value must be one of"),
    ({"cniBinDir": "opt/cni/bin"}, "at '/cniBinDir': 'opt/cni/bin' does not match pattern"),
    ({"repair": {"enabled": "yes"}}, "at '/repair/enabled': got string, want boolean"),
    ({"repair": None}, "missing property 'repair'"),
    ({"global_": {"logging": None}}, "at '/global': missing property 'logging'"),
    ({"acceleration": "max"}, "at '/acceleration': value must be one of 'off', 'proxy', 'full'"),
    ({"global_": {"imagePullSecrets": [{"name": "x"}]}}, "at '/global/imagePullSecrets/0': got object, want string"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED)
def test_what_is_not_supported_ends_the_render_with_a_sentence(values: dict[str, Any], sentence: str) -> None:
    said = refusal(**values)
    assert f"\n{sentence}" in said
    (line,) = [each for each in said.splitlines() if each.startswith(sentence)]
    assert line.endswith(".")


def test_every_refusal_is_told_at_once() -> None:
    _, _, told = refusal(ownerName="z", profile="x", variant="y").partition("\n\n")
    assert [each.split(":")[0] for each in told.splitlines()[:3]] == ["variant", "profile", "ownerName"]


@pytest.mark.parametrize(("values", "words"), MISTAKEN)
def test_an_unknown_value_or_a_wrong_type_is_named(values: dict[str, Any], words: str) -> None:
    assert words in refusal(**values)


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


class Pods:
    """The DaemonSet's pod template, as a test looks at it."""

    def __init__(self, **arguments: Any) -> None:
        self.daemonset = one(template(**arguments), "DaemonSet")
        self.template = self.daemonset["spec"]["template"]
        self.spec = self.template["spec"]
        (self.container,) = self.spec["containers"]
        self.env = {each["name"]: each.get("value") for each in self.container["env"]}
        self.paths = {each["name"]: each.get("hostPath", {}).get("path") for each in self.spec["volumes"]}


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ({}, f"sidestep:{VERSION}"),
        ({"hub": "here", "global_": {"hub": "there", "tag": "2"}}, "here/sidestep:2"),
        ({"global_": {"hub": "there"}, "tag": 3}, "there/sidestep:3"),
        ({"image": "registry/any@sha256:0", "hub": "here", "tag": "2"}, "registry/any@sha256:0"),
    ],
)
def test_the_image_is_named_as_in_istios_chart(values: dict[str, Any], image: str) -> None:
    assert Pods(**values).container["image"] == image


@pytest.mark.parametrize(
    ("platform", "paths"),
    [
        ("", ("/opt/cni/bin", "/etc/cni/net.d", "/var/run/netns")),
        ("gke", ("/home/kubernetes/bin", "/etc/cni/net.d", "/var/run/netns")),
        ("k3d", ("/bin", "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/run/netns")),
        ("k3s", ("/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/run/netns")),
        (
            "microk8s",
            ("/var/snap/microk8s/current/opt/cni/bin", "/var/snap/microk8s/current/args/cni-network", "/var/run/netns"),
        ),
        ("minikube", ("/opt/cni/bin", "/etc/cni/net.d", "/var/run/docker/netns")),
        ("openshift", ("/var/lib/cni/bin", "/etc/cni/multus/net.d", "/var/run/netns")),
    ],
)
def test_a_platform_says_where_the_nodes_keep_things(platform: str, paths: tuple[str, ...]) -> None:
    for values in ({"platform": platform}, {"global_": {"platform": platform}}):
        found = Pods(**values).paths
        assert (found["cni-bin"], found["cni-net"], found["netns"]) == paths


def test_a_users_value_comes_before_that_of_the_platform() -> None:
    pods = Pods(platform="openshift", cniBinDir="/mine", provider="default", seLinuxOptions={"type": "mine_t"})
    assert pods.paths["cni-bin"] == "/mine"
    assert (pods.env["CHAINED_CNI_PLUGIN"], pods.env["CNI_CONF_NAME"]) == ("true", "")
    assert pods.container["securityContext"]["seLinuxOptions"] == {"type": "mine_t"}
    kinds = {each["kind"] for each in template(platform="gke", resourceQuotas={"enabled": False})}
    assert "ResourceQuota" not in kinds


def test_gke_is_recognized_and_k3s_has_to_be_named() -> None:
    assert Pods(version="1.36.0-gke.100").paths["cni-bin"] == "/home/kubernetes/bin"
    assert "global.platform: this is k3s" in refusal(version="1.36.0+k3s1")
    assert Pods(version="1.36.0+k3s1", platform="k3s").paths["cni-bin"] == "/var/lib/rancher/k3s/data/cni"
    assert Pods(version="1.36.0+k3s1", cniBinDir="/a", cniConfDir="/b").paths["cni-net"] == "/b"


def test_multus_gets_a_network_of_its_own_on_any_platform() -> None:
    for platform in ("", "k3s", "openshift"):
        objects = template(provider="multus", platform=platform)
        network = one(objects, "NetworkAttachmentDefinition")
        assert (network["metadata"]["namespace"], network["metadata"]["name"]) == ("default", "istio-cni")
        pods = Pods(provider="multus", platform=platform)
        assert (pods.env["CHAINED_CNI_PLUGIN"], pods.env["CNI_CONF_NAME"]) == ("false", "istio-cni.conf")
        assert pods.paths["cni-net"] == "/etc/cni/multus/net.d"
    assert "NetworkAttachmentDefinition" not in {each["kind"] for each in template()}


def test_gke_gets_a_quota_where_it_admits_no_pods_without_one() -> None:
    quota = one(template(platform="gke"), "ResourceQuota")
    (scope,) = quota["spec"]["scopeSelector"]["matchExpressions"]
    assert scope["values"] == ["system-node-critical"] and quota["spec"]["hard"] == {"pods": "5000"}
    kinds = {each["kind"] for each in template(namespace="kube-system", platform="gke")}
    assert "ResourceQuota" not in kinds
    other = one(template(priorityClassName="mine", resourceQuotas={"enabled": True, "pods": 7}), "ResourceQuota")
    assert other["spec"]["hard"] == {"pods": "7"}
    assert other["spec"]["scopeSelector"]["matchExpressions"][0]["values"] == ["mine"]


def test_apparmor_is_a_field_where_kubernetes_has_it_and_else_an_annotation() -> None:
    beta = "container.apparmor.security.beta.kubernetes.io/install-cni"
    for version, arguments, field, annotated in (
        ("1.29", {}, False, True),
        ("1.30", {}, True, False),
        ("1.30", {"useAppArmorAnnotation": True}, True, True),
        ("1.29", {"useAppArmorAnnotation": False}, False, False),
    ):
        pods = Pods(version=version, **arguments)
        assert ("appArmorProfile" in pods.container["securityContext"]) is field
        assert (beta in pods.template["metadata"]["annotations"]) is annotated
    profile = {"type": "Localhost", "localhostProfile": "x"}
    assert Pods(appArmorProfile=profile).container["securityContext"]["appArmorProfile"] == profile


@pytest.mark.parametrize(
    ("values", "name", "value"),
    [
        ({"excludeNamespaces": ["a", "b"]}, "EXCLUDE_NAMESPACES", "a,b"),
        ({"excludeNamespaces": []}, "EXCLUDE_NAMESPACES", ""),
        ({"global_": {"logging": {"level": "warn"}}}, "LOG_LEVEL", "warn"),
        ({"logging": {"level": "debug"}, "global_": {"logging": {"level": "warn"}}}, "LOG_LEVEL", "debug"),
        ({"global_": {"logAsJson": True}}, "LOG_AS_JSON", "true"),
        ({"cniConfFileName": "10-calico.conflist"}, "CNI_CONF_NAME", "10-calico.conflist"),
        ({"istioOwnedCNIConfig": True}, "ISTIO_OWNED_CNI_CONFIG", "true"),
        (
            {"istioOwnedCNIConfigFileName": "02-istio-cni.conflist"},
            "ISTIO_OWNED_CNI_CONFIG_FILENAME",
            "02-istio-cni.conflist",
        ),
        ({"chained": False}, "CHAINED_CNI_PLUGIN", "false"),
        ({"repair": {"enabled": False}}, "REPAIR_ENABLED", "false"),
        ({"repair": {"initContainerName": "x"}}, "REPAIR_INIT_CONTAINER_NAME", "x"),
        ({"repair": {"brokenPodLabelKey": "a/b"}}, "REPAIR_BROKEN_POD_LABEL_KEY", "a/b"),
        ({"repair": {"brokenPodLabelValue": "c"}}, "REPAIR_BROKEN_POD_LABEL_VALUE", "c"),
        ({"acceleration": "proxy"}, "SIDESTEP_ACCELERATION", "proxy"),
        ({"uncaptured": {"default": "deny"}}, "SIDESTEP_UNCAPTURED", "deny"),
        ({"uncaptured": {"exemptNamespaces": ["a", "b"]}}, "SIDESTEP_UNCAPTURED_EXEMPT_NAMESPACES", "a,b"),
        ({"uncaptured": {"events": True}}, "SIDESTEP_UNCAPTURED_EVENTS", "true"),
        ({"livePolicy": True}, "SIDESTEP_LIVE_POLICY", "true"),
        ({"shadow": True}, "SIDESTEP_SHADOW", "true"),
        ({"agentTimeoutSeconds": 2.5}, "SIDESTEP_AGENT_TIMEOUT_SECONDS", "2.5"),
        ({"reconcileSeconds": 1000000}, "SIDESTEP_RECONCILE_SECONDS", "1e+06"),
        ({"env": {"LOG_LEVEL": "error"}}, "LOG_LEVEL", "error"),
        ({"env": {"TZ": "UTC"}}, "TZ", "UTC"),
        ({"env": {"SIDESTEP_LACKING": "iterator"}}, "SIDESTEP_LACKING", "iterator"),
        ({"env": {"SIDESTEP_BYTECODE": "/host/kept"}}, "SIDESTEP_BYTECODE", "/host/kept"),
        ({"env": {"REPAIR_INIT_CONTAINER_EXIT_CODE": 0}}, "REPAIR_INIT_CONTAINER_EXIT_CODE", "0"),
    ],
)
def test_a_value_that_the_agent_must_know_rolls_the_daemonset(values: dict[str, Any], name: str, value: str) -> None:
    pods = Pods(**values)
    assert pods.env[name] == value
    assert pods.template != Pods().template


def test_a_value_that_is_taken_away_is_the_agents_default() -> None:
    for values, name in (
        ({"acceleration": None}, "SIDESTEP_ACCELERATION"),
        ({"repair": {"enabled": None}}, "REPAIR_ENABLED"),
        ({"excludeNamespaces": None}, "EXCLUDE_NAMESPACES"),
    ):
        assert Pods(**values).env[name] == ""


def test_other_ports_are_the_same_for_the_agent_kubelet_and_prometheus() -> None:
    values: dict[str, Any] = {"env": {"MONITORING_PORT": 25014, "SIDESTEP_HEALTH_PORT": "9000"}}
    pods = Pods(**values)
    assert (pods.env["MONITORING_PORT"], pods.env["SIDESTEP_HEALTH_PORT"]) == ("25014", "9000")
    assert [each["containerPort"] for each in pods.container["ports"]] == [25014, 9000]
    assert pods.template["metadata"]["annotations"]["prometheus.io/port"] == "25014"
    policy = one(template(**values, global_={"networkPolicy": {"enabled": True}}), "NetworkPolicy")
    assert [each["port"] for each in policy["spec"]["ingress"][0]["ports"]] == [25014, 9000]


@pytest.mark.parametrize(
    ("repair", "rule"),
    [
        ({"repairPods": False, "deletePods": True, "labelPods": True}, (["pods"], ["delete"])),
        ({"repairPods": False, "labelPods": True}, (["pods/status"], ["patch"])),
        ({"deletePods": True, "labelPods": True}, None),
        ({"enabled": False, "repairPods": False, "deletePods": True}, None),
    ],
)
def test_the_agent_may_touch_pods_only_if_it_is_to_do_so(repair: dict[str, bool], rule: Any) -> None:
    rules = one(template(repair=repair), "ClusterRole")["rules"]
    further = [(each["resources"], each["verbs"]) for each in rules[2:]]
    assert further == ([rule] if rule else [])


def test_labels_and_annotations_are_added_and_never_replace_those_that_are_needed() -> None:
    mine = {"k8s-app": "x", "sidecar.istio.io/inject": "true", "mine": "y"}
    pods = Pods(daemonSetLabels=mine, podLabels=mine, podAnnotations=mine)
    for found in (pods.daemonset["metadata"]["labels"], pods.template["metadata"]["labels"]):
        assert (found["k8s-app"], found["mine"]) == ("istio-cni-node", "y")
    for found in (pods.template["metadata"]["labels"], pods.template["metadata"]["annotations"]):
        assert (found["sidecar.istio.io/inject"], found["mine"]) == ("false", "y")


def test_the_pods_are_as_the_values_say() -> None:
    affinity: dict[str, Any] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
    pods = Pods(
        affinity=affinity,
        tolerations=[],
        updateStrategy={"type": "OnDelete", "rollingUpdate": None},
        terminationGracePeriodSeconds=45,
        priorityClassName="mine",
        seccompProfile={"type": "RuntimeDefault"},
        resources={"limits": {"memory": "1Gi"}},
        pullPolicy="Always",
        global_={"imagePullSecrets": ["one", "two"], "imagePullPolicy": "Never"},
    )
    assert pods.spec["affinity"] == affinity
    assert "tolerations" not in pods.spec
    assert pods.daemonset["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert pods.spec["terminationGracePeriodSeconds"] == 45
    assert pods.spec["priorityClassName"] == "mine"
    assert pods.spec["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]
    assert pods.container["imagePullPolicy"] == "Always"
    assert pods.container["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pods.container["resources"]["limits"] == {"memory": "1Gi"}
    default = Pods(resources=None).container["resources"]
    assert default == {"requests": {"cpu": "100m"}}


def test_one_scope_and_the_other_are_everything() -> None:
    def kinds(scope: str) -> list[str]:
        return [each["kind"] for each in template(global_={"resourceScope": scope})]

    assert set(kinds("cluster")) == {"ClusterRole", "ClusterRoleBinding"}
    assert sorted(kinds("cluster") + kinds("namespace")) == sorted(kinds("all"))


def test_everything_is_in_the_namespace_of_the_release() -> None:
    objects = template(namespace="elsewhere", global_={"networkPolicy": {"enabled": True}})
    for each in objects:
        if not each["kind"].startswith("Cluster"):
            assert each["metadata"]["namespace"] == "elsewhere"
        for subject in each.get("subjects", ()):
            assert subject["namespace"] == "elsewhere"


def test_a_revision_is_a_label_of_every_object() -> None:
    assert {each["metadata"]["labels"].get("istio.io/rev") for each in template(revision="canary")} == {"canary"}
    assert not any("istio.io/rev" in each["metadata"]["labels"] for each in template())


def test_ambient_mode_brings_its_settings_its_rights_and_ztunnels_directory() -> None:
    selectors = [{"podSelector": {"matchLabels": {"team": "a"}}}]
    objects = template(ambient={"enabled": True, "enablementSelectors": selectors, "dnsCapture": False})
    (daemonset,) = (each for each in objects if each["kind"] == "DaemonSet")
    spec = daemonset["spec"]["template"]["spec"]
    env = {each["name"]: each.get("value") for each in spec["containers"][0]["env"]}
    assert env["AMBIENT_ENABLED"] == "true" and env["AMBIENT_DNS_CAPTURE"] == "false"
    assert yaml.safe_load(env["AMBIENT_ENABLEMENT_SELECTOR"]) == selectors
    assert env["ZTUNNEL_UDS_ADDRESS"].startswith(
        next(each["mountPath"] for each in spec["containers"][0]["volumeMounts"] if each["name"] == "ztunnel")
    )
    role = next(each for each in objects if each["kind"] == "ClusterRole")
    granted = {resource: rule["verbs"] for rule in role["rules"] for resource in rule["resources"]}
    assert granted["namespaces"] == ["get", "list", "watch"] and granted["pods/status"] == ["patch"]


def test_without_ambient_mode_there_is_nothing_of_it() -> None:
    assert "ztunnel" not in [
        each["name"]
        for manifest in template()
        if manifest["kind"] == "DaemonSet"
        for each in manifest["spec"]["template"]["spec"]["volumes"]
    ]
    role = next(each for each in template() if each["kind"] == "ClusterRole")
    assert "namespaces" not in [resource for rule in role["rules"] for resource in rule["resources"]]
