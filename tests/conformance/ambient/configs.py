"""The configurations of pods in ambient mode."""

from cni.policy.ambient_policy import AmbientPolicy
from tests.conformance.configs import AmbientConfig

_DNS = AmbientPolicy(dns_capture=True)

CONFIGS = (
    AmbientConfig("ambient"),
    AmbientConfig("ambient-dns", _DNS),
    AmbientConfig("ambient-ingress", AmbientPolicy(bypass_inbound_capture=True)),
    AmbientConfig("ambient-ingress-dns", AmbientPolicy(bypass_inbound_capture=True, dns_capture=True)),
    AmbientConfig("ambient-no-ipv6", AmbientPolicy(ipv6=False)),
    AmbientConfig("ambient-dns-no-ipv6", AmbientPolicy(ipv6=False, dns_capture=True)),
    AmbientConfig("ambient-trust-mark", AmbientPolicy(dns_capture=True, trust_mark=True)),
    AmbientConfig("ambient-ipv4-only", _DNS, families=(4,)),
    AmbientConfig("ambient-ipv6-only", _DNS, families=(6,)),
    AmbientConfig("ambient-no-default-route", _DNS, has_default_route=False),
)
