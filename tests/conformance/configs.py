"""The pod configurations of the suite: annotations, proxy environment and ids, and which addresses the pod has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.annotations import CapturePolicy, policy_of
from cni.policy.pod import Pod

TRAFFIC = "traffic.sidecar.istio.io/"
MODE = "sidecar.istio.io/interceptionMode"
DUAL = {"ISTIO_DUAL_STACK": "true"}
DNS = {**DUAL, "ISTIO_META_DNS_CAPTURE": "true"}


@dataclass(frozen=True)
class Config:
    """One pod as its injector would write it."""

    name: str
    annotations: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=lambda: DUAL)
    ids: tuple[int, int] = (1337, 1337)  # runAsUser and runAsGroup of istio-proxy
    families: tuple[int, ...] = (4, 6)
    claims: tuple[str, ...] = ()  # addresses that the pod adds while it runs
    workers: int = 1  # of the proxy: each has a listener of its own for each port and family
    has_default_route: bool = True

    def manifest(self) -> dict[str, Any]:
        """The Pod."""
        container = {
            "name": "istio-proxy",
            "args": ["proxy", "sidecar"],
            "env": [{"name": name, "value": value} for name, value in self.env.items()],
            "securityContext": {"runAsUser": self.ids[0], "runAsGroup": self.ids[1]},
        }
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "annotations": {"sidecar.istio.io/status": "{}", **self.annotations}},
            "spec": {"containers": [container]},
        }

    @property
    def policy(self) -> CapturePolicy:
        """What the annotations ask for."""
        return policy_of(Pod.model_validate(self.manifest()))

    @property
    def captures_ipv6(self) -> bool:
        """As Istio decides it: by the first address, or by ISTIO_DUAL_STACK."""
        return 6 in self.families and (self.policy.dual_stack or 4 not in self.families)


@dataclass(frozen=True)
class AmbientConfig:
    """One pod in ambient mode."""

    name: str
    policy: AmbientPolicy = field(default_factory=AmbientPolicy)
    families: tuple[int, ...] = (4, 6)
    has_default_route: bool = True

    @property
    def captures_ipv6(self) -> bool:
        """As Istio decides it: whatever the pod has."""
        return self.policy.ipv6


def _traffic(name: str, env: Mapping[str, str] = DUAL, **values: str) -> Config:
    """A configuration by the annotations' short names."""
    return Config(name, {TRAFFIC + key: value for key, value in values.items()}, env)


def _tproxy(
    name: str, env: Mapping[str, str] = DUAL, ids: tuple[int, int] = (0, 1337), workers: int = 1, **values: str
) -> Config:
    """The injector runs TPROXY proxies as root with the usual group."""
    annotations = {MODE: "TPROXY", **{TRAFFIC + key: value for key, value in values.items()}}
    return Config(name, annotations, env, ids, workers=workers)


CONFIGS = (
    Config("default"),
    Config("no-dual-stack", env={}),
    Config("ipv6-only", env={}, families=(6,)),
    Config("ipv4-only", env={}, families=(4,)),
    Config("no-default-route", has_default_route=False),
    Config("no-default-route-dns", env=DNS, has_default_route=False),
    Config("custom-ids", ids=(1000670000, 1000670001)),
    Config("root-proxy", ids=(0, 1337)),
    Config("invalid-drop", env={**DUAL, "INVALID_DROP": "true"}),
    _traffic("out-include-none", includeOutboundIPRanges=""),
    _traffic("out-include-one", includeOutboundIPRanges="203.0.113.0/24,2001:db8:1::/48"),
    _traffic("out-include-several", includeOutboundIPRanges="10.0.0.0/8,198.51.100.7/32,fd20::/64"),
    _traffic("out-include-loopback", includeOutboundIPRanges="127.0.0.0/8,10.20.0.0/16,::1/128,fd20::/64"),
    _traffic("out-include-host-bits", includeOutboundIPRanges="203.0.113.99/24,10.21.0.77/16"),
    _traffic("out-exclude", excludeOutboundIPRanges="203.0.113.0/24,2001:db8:1::/48"),
    _traffic(
        "out-exclude-longer-include",
        includeOutboundIPRanges="203.0.113.7/32,198.51.100.0/24,2001:db8:1::7/128",
        excludeOutboundIPRanges="203.0.113.0/24,2001:db8:1::/48",
    ),
    _traffic("out-exclude-all-ipv4", excludeOutboundIPRanges="0.0.0.0/0"),
    _traffic("out-exclude-ports", excludeOutboundPorts="80,5555,8080"),
    _traffic("out-exclude-ports-empty", excludeOutboundPorts=""),
    _traffic("out-include-ports", includeOutboundIPRanges="", includeOutboundPorts="80,5555"),
    _traffic(
        "out-include-ports-excluded",
        includeOutboundPorts="80,443",
        excludeOutboundPorts="443",
        excludeOutboundIPRanges="203.0.113.0/24",
    ),
    _traffic("in-include", includeInboundPorts="8080,15020,9999,15006"),
    _traffic("in-none", includeInboundPorts=""),
    _traffic("in-exclude", excludeInboundPorts="22,8080"),
    _traffic("no-eth1", excludeInterfaces="eth1"),
    _traffic("no-eth0", excludeInterfaces="eth0"),
    _traffic("no-lo", excludeInterfaces="lo"),
    _traffic("dns", env=DNS),
    _traffic("dns-53-excluded", env=DNS, excludeOutboundPorts="53"),
    _traffic("dns-range-excluded", env=DNS, excludeOutboundIPRanges="203.0.113.0/24,2001:db8:1::/48"),
    _traffic("dns-include-none", env=DNS, includeOutboundIPRanges=""),
    _traffic("dns-include-loopback", env=DNS, includeOutboundIPRanges="127.0.0.0/8"),
    _traffic("dns-no-eth1", env=DNS, excludeInterfaces="eth1"),
    _traffic("dns-no-lo", env=DNS, excludeInterfaces="lo"),
    Config("dns-ipv4-of-two", env={"ISTIO_META_DNS_CAPTURE": "1"}),
    Config("dns-root-proxy", env=DNS, ids=(0, 1337)),
    Config("2-workers", workers=2),
    Config("16-workers", workers=16),
    Config("17-workers", workers=17),
    Config("64-workers", workers=64),
    Config("64-workers-ipv6-only", env={}, families=(6,), workers=64),
    _tproxy("tproxy"),
    _tproxy("tproxy-17-workers", workers=17),
    _tproxy("tproxy-by-uid", ids=(1337, 1337)),
    _tproxy("tproxy-in-include", includeInboundPorts="8080,15008"),
    _tproxy("tproxy-in-none", includeInboundPorts=""),
    _tproxy("tproxy-in-exclude", excludeInboundPorts="8080"),
    _tproxy("tproxy-out-exclude-ports", excludeOutboundPorts="8080,80"),
    _tproxy("tproxy-dns", env=DNS),
    _tproxy("tproxy-no-eth1", excludeInterfaces="eth1"),
    _tproxy("tproxy-no-lo", excludeInterfaces="lo"),
)

# A pod of the same node. It has some addresses of the pod under test as well, but other rules, and another proxy.
NEIGHBOUR = Config(
    "neighbour",
    {
        TRAFFIC + "includeInboundPorts": "80",
        TRAFFIC + "includeOutboundIPRanges": "",
        TRAFFIC + "includeOutboundPorts": "443",
    },
    ids=(4337, 4337),
    claims=("10.20.0.3", "fd20::3"),
)
