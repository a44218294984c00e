"""The two pods whose rules decide: what is theirs, and who has got a connection that they capture."""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from cni.policy.decision import Action, IPAddress
from tests.conformance.configs import NEIGHBOUR, AmbientConfig, Config
from tests.conformance.probe import ADDRESSES, Probe

# what a client is told of a connection that has nowhere to go
UNREACHABLE = frozenset(map(os.strerror, (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL)))


def plain(address: str) -> IPAddress:
    """An address without its interface; an IPv4-mapped one as IPv4."""
    found = ip_address(address.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


@dataclass(frozen=True)
class Party:
    """One pod."""

    own: frozenset[IPAddress]
    captured: Mapping[str, Action]  # who answers → what has become of it; anybody else has got it directly
    ports: Mapping[str, int]  # where they listen
    nics: Mapping[str, str]  # the interface that faces each place outside
    outside: Mapping[tuple[str, int], str]  # whom a probe from there comes from, by place and family

    def takes(self, hit: str, port: int) -> set[Action]:
        """What may have become of a connection to a port. A proxy's own port looks the same captured and direct."""
        if hit in UNREACHABLE:
            return {"unreachable", "pass"}  # direct, if the kernel had the last word
        return {self.captured.get(hit, "pass"), *(("pass",) if self.ports.get(hit) == port else ())}


def _own(*names: str) -> frozenset[IPAddress]:
    return frozenset(plain(each) for name in names for each in ADDRESSES[name] if each)


def _captured(outbound: str, inbound: str, resolver: str) -> tuple[dict[str, Action], dict[str, int]]:
    return (
        {outbound: "proxy-outbound", inbound: "proxy-inbound", resolver: "dns"},
        {outbound: 15001, inbound: 15006, resolver: 15053},
    )


_PARTIES = {
    "pod": Party(
        _own("own", "own2", "own-eth1", "own-eth1-by-eth0", "shared", "link-local"),
        *_captured("E1", "E6", "D"),
        {"peer": "eth0", "beyond": "eth1"},
        {("peer", 4): "10.20.0.1", ("peer", 6): "fd20::1", ("beyond", 4): "10.21.0.1", ("beyond", 6): "fd21::1"},
    ),
    "neighbour": Party(
        _own("neighbour", "shared", "link-local", "own2"),
        *_captured("N1", "N6", "ND"),
        {"beyond": "eth0"},
        {("beyond", 4): "10.22.0.1", ("beyond", 6): "fd22::1"},
    ),
}


def party(probe: Probe) -> Party:
    """The pod whose rules decide about a probe."""
    return _PARTIES[probe.whose]


def judging(config: Config | AmbientConfig, probe: Probe) -> Config | AmbientConfig:
    """The configuration that decides about a probe of the pod of `config`."""
    return NEIGHBOUR if probe.whose == "neighbour" else config
