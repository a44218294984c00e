"""Which of Istio's tests run, and in what mesh.

The meshes are what Istio's own test framework would install (tests/integration/base.yaml and
iop-integration-test-defaults.yaml in its module, and what the packages ask for), without what needs Istio's Envoy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tests.cluster.istio_tests.programs import Package
from tests.cluster.mesh import DUAL_STACK, Values

_RESOURCES = {"requests": {"cpu": "10m", "memory": "40Mi"}}
BASE: Values = {
    "meshConfig": {
        "defaultHttpRetryPolicy": {},
        "accessLogFile": "/dev/stdout",
        "defaultConfig": {"proxyMetadata": {"ISTIO_META_DNS_CAPTURE": "true"}},
    },
    "pilot": {
        "keepaliveMaxServerConnectionAge": "120s",
        "env": {
            "ENABLE_EXTERNAL_NAME_ALIAS": "true",
            "UNSAFE_ENABLE_ADMIN_ENDPOINTS": "true",
            "PILOT_REMOTE_CLUSTER_TIMEOUT": "15s",
            "PILOT_ENABLE_ALPHA_GATEWAY_API": "true",
            "ISTIO_DUAL_STACK": "false",
        },
    },
    "global": {"proxy": {"resources": _RESOURCES}, "networkPolicy": {"enabled": True}},
}
_DUAL: Values = {**DUAL_STACK, "pilot": {**DUAL_STACK["pilot"], "env": {"ISTIO_DUAL_STACK": "true"}}}
# tests/integration/security/main_test.go
_SECURITY: Values = {
    "pilot": {"env": {"PILOT_JWT_ENABLE_REMOTE_JWKS": "true", "PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS": "true"}},
    "meshConfig": {"defaultConfig": {"gatewayTopology": {"numTrustedProxies": 1}}},
}
_PORTS = {
    "status-port": (15021, 15021),
    "http2": (80, 8080),
    "https": (443, 8443),
    "tls": (15443, 15443),
    "tls-istiod": (15012, 15012),
    "tls-webhook": (15017, 15017),
    "tcp": (31400, 31400),
}
RACE = "TestCNIRaceRepair"


@dataclass(frozen=True)
class Suite:
    """A package of tests in one mesh. `tests` and `skipped` are patterns of Go's -test.run and -test.skip."""

    name: str
    package: Package
    values: tuple[Values, ...] = (BASE,)
    families: tuple[str, ...] = ("IPv4",)
    tests: str = ""
    skipped: str = ""
    # of the chart of who captures, the same on both sides
    capture: Mapping[str, str] = field(default_factory=dict)

    def gateway(self, kind: str) -> Values:
        """Values of the chart of the ingress or the egress gateway, which nobody gives an address from outside."""
        ports = [
            {"port": port, "targetPort": target, "name": name, "protocol": "TCP"}
            for name, (port, target) in _PORTS.items()
        ]
        own = {"autoscaleEnabled": False, "type": "NodePort" if kind == "ingress" else "ClusterIP"}
        more = {"ports": ports} if kind == "ingress" else {}
        two = {"ipFamilyPolicy": "RequireDualStack"} if len(self.families) > 1 else {}
        return {"gateways": {f"istio-{kind}gateway": {**own, "resources": _RESOURCES, **more, **two}}}


_REPAIR = {"repair.repairPods": "true", "repair.deletePods": "false"}
_DELETE = {"repair.repairPods": "false", "repair.deletePods": "true"}
_PILOT, _SECURITY_TESTS = Package("pilot"), Package("security")
SUITES = (
    Suite("pilot", _PILOT, skipped=f"^{RACE}$"),
    Suite("security", _SECURITY_TESTS, values=(BASE, _SECURITY)),
    Suite("dual", _PILOT, values=(BASE, _DUAL), families=("IPv4", "IPv6"), skipped=f"^{RACE}$"),
    Suite("race-repair", _PILOT, tests=f"^{RACE}$", capture=_REPAIR),
    Suite("race-delete", _PILOT, tests=f"^{RACE}$", capture=_DELETE),
)


def select(pattern: str) -> list[Suite]:
    """Those whose names fit, as a shell has it. Raises LookupError if there is none."""
    found = [each for each in SUITES if fnmatchcase(each.name, pattern)]
    if not found:
        raise LookupError(f"{pattern!r} is none of {', '.join(each.name for each in SUITES)}")
    return found
