"""The kinds of connections: who connects from where to what, for each family in which that makes sense."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tests.conformance.configs import Config

Family = Literal["4", "6", "mapped"]
Ids = tuple[int, int]
APP: Ids = (1000, 1000)
ROOT: Ids = (0, 0)

# Names of addresses, by family: the pod's own, those of the two ends outside, and what is behind them.
ADDRESSES: dict[str, tuple[str, str]] = {
    "own": ("10.20.0.2", "fd20::2"),
    "own2": ("10.20.0.3", "fd20::3"),
    "own-eth1": ("10.21.0.2", "fd21::2"),
    "own-eth1-by-eth0": ("10.21.0.3", "fd21::3"),
    "peer": ("10.20.0.1", "fd20::1"),
    "beyond": ("10.21.0.1", "fd21::1"),
    "remote": ("203.0.113.7", "2001:db8:1::7"),
    "remote2": ("198.51.100.7", "2001:db8:2::7"),
    "behind-eth1": ("10.99.0.9", "fd99::9"),
    "lo": ("127.0.0.1", "::1"),
    "lo5": ("127.0.0.5", ""),
    "lo123": ("127.1.2.3", ""),
    "src6": ("127.0.0.6", "::6"),
    "any": ("0.0.0.0", "::"),
    "resolver": ("127.0.0.53", ""),
    "unreachable": ("10.88.0.9", "fd88::9"),
    "prohibited": ("10.88.1.9", "fd88:0:0:1::9"),
    "blackhole": ("10.88.2.9", "fd88:0:0:2::9"),
    "multicast": ("239.1.2.3", "ff0e::1"),
    "broadcast": ("10.20.0.255", ""),
    "everybody": ("255.255.255.255", ""),
    "local-route": ("10.201.0.9", "fd77::9"),
}
# the routes of the pod that lead nowhere, by the kind of the route
NOWHERE: dict[str, tuple[str, str]] = {
    "unreachable": ("10.88.0.0/24", "fd88::/64"),
    "prohibit": ("10.88.1.0/24", "fd88:0:0:1::/64"),
    "blackhole": ("10.88.2.0/24", "fd88:0:0:2::/64"),
}
LOCAL_ROUTES = ("10.201.0.0/24", "fd77::/64")


def address(name: str, family: Family) -> str:
    """An address by name; empty when that family has none."""
    four, six = ADDRESSES[name]
    return {"4": four, "6": six, "mapped": f"::ffff:{four}"}[family]


@dataclass(frozen=True)
class Probe:
    """One connection, or one socket's queries, as the prober makes it (prober.py)."""

    kind: str
    family: Family
    destinations: tuple[tuple[str, int], ...]
    opener: Ids = APP
    connector: Ids = APP
    place: Literal["pod", "peer", "beyond"] = "pod"
    protocol: Literal["tcp", "udp"] = "tcp"
    how: Literal["connected", "unconnected"] = "connected"
    source: str = ""
    source_port: int = 0
    device: str = ""
    mark: int = 0
    held: bool = False  # several connections at the same time

    @property
    def name(self) -> str:
        """Kind and family."""
        return f"{self.kind}/{self.family}"

    @property
    def version(self) -> int:
        """Of IP."""
        return 6 if self.family == "6" else 4

    def request(self) -> dict[str, Any]:
        """What the prober reads."""
        return asdict(self)


@dataclass(frozen=True)
class Kind:
    """A kind of connection, of any family."""

    name: str
    to: str
    port: int
    ids: Ids = APP
    families: str = "4 6 mapped"
    more: tuple[str, ...] = ()  # further destinations
    source: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def probes(self) -> Iterator[Probe]:
        """One for each family that has the addresses."""
        for family in self.families.split():
            assert family in ("4", "6", "mapped")
            addresses = [address(name, family) for name in (self.to, *self.more)]  # type: ignore[arg-type]
            if not all(addresses):
                continue
            probe = Probe(
                self.name,
                family,  # type: ignore[arg-type]
                tuple((each, self.port) for each in addresses),
                self.ids,
                self.ids,
                source=address(self.source, family) if self.source else "",  # type: ignore[arg-type]
            )
            yield replace(probe, **dict(self.options))


def probes_of(config: Config) -> list[Probe]:
    """Everything to try on a pod. Families that it has no addresses of are left out, unless that is the point."""
    policy = config.policy
    kinds = [*_outbound(config), *_loopback(config), *_inbound(), *_dns(config), *_routes(config)]
    if policy.mode == "TPROXY" and config.ids[0] == 0:
        kinds += _original_source(config)
    probes = [probe for kind in kinds for probe in kind.probes()]
    return [each for each in probes if each.version in config.families or each.kind.startswith("route.remote")]


def _outbound(config: Config) -> Iterator[Kind]:
    proxy, by_uid, by_gid = config.ids, (config.policy.proxy_uid, 2000), (0, config.policy.proxy_gid)
    for port in (22, 80, 443, 5555, 8080, 15001, 15006, 15008, 15020, 15021, 15090):
        yield Kind(f"out.app.{port}", "remote", port)
    yield Kind("out.app.53", "remote", 53)
    yield Kind("out.app.remote2", "remote2", 80)
    yield Kind("out.app.peer", "peer", 8080)
    yield Kind("out.app.eth1", "beyond", 80)
    yield Kind("out.app.behind-eth1", "behind-eth1", 80)
    yield Kind("out.root", "remote", 80, ROOT)
    yield Kind("out.nobody", "remote", 80, (65534, 65534))
    yield Kind("out.1337", "remote", 80, (1337, 1337))
    yield Kind("out.proxy", "remote", 80, proxy)
    yield Kind("out.proxyuid", "remote", 80, by_uid)
    yield Kind("out.proxygid", "remote", 80, by_gid)
    yield Kind("out.proxy.15001", "remote", 15001, proxy)
    yield Kind("out.appgid", "remote", 80, (1000, config.policy.proxy_gid))
    owner = (config.policy.proxy_uid, config.policy.proxy_gid)
    yield Kind("out.opened-by-root-connected-by-proxy", "remote", 80, ROOT, options=(("connector", owner),))
    yield Kind("out.opened-by-proxy-connected-by-app", "remote", 80, owner, options=(("connector", APP),))
    yield Kind("out.app.from-own", "remote", 80, source="own")
    yield Kind("out.app.from-own2", "remote", 80, source="own2")
    yield Kind("out.app.from-own-port", "remote", 80, source="own", options=(("source_port", 25001),))
    yield Kind("out.app.from-any-port", "remote", 80, source="any", options=(("source_port", 25002),))
    yield Kind("out.proxy.device-eth0", "remote", 80, proxy, options=(("device", "eth0"),))
    two = (("source_port", 25003), ("held", True))
    yield Kind("out.app.one-port-two-remotes", "remote", 80, source="own", more=("remote2",), options=two)
    yield Kind("out.app.any-port-two-remotes", "remote", 80, source="any", more=("remote2",), options=two)
    yield Kind("udp.app.80", "remote", 80, options=(("protocol", "udp"),))
    yield Kind("udp.app.80.unconnected", "remote", 80, options=(("protocol", "udp"), ("how", "unconnected")))


def _loopback(config: Config) -> Iterator[Kind]:
    proxy, by_uid, by_gid = config.ids, (config.policy.proxy_uid, 2000), (0, config.policy.proxy_gid)
    for to in ("lo", "lo5", "lo123", "any", "own", "own2", "own-eth1"):
        yield Kind(f"lo.app.{to}", to, 8080)
        yield Kind(f"lo.proxy.{to}", to, 8080, proxy)
    yield Kind("lo.root.own", "own", 8080, ROOT)
    for port in (80, 443, 15001, 15006, 15008, 15020, 15090, 9999):
        yield Kind(f"lo.app.own.{port}", "own", port)
        yield Kind(f"lo.proxy.own.{port}", "own", port, proxy)
    for port in (15001, 15006):
        yield Kind(f"lo.app.lo.{port}", "lo", port)
        yield Kind(f"lo.app.lo5.{port}", "lo5", port)
    yield Kind("lo.proxyuid.own", "own", 8080, by_uid)
    yield Kind("lo.proxygid.own", "own", 8080, by_gid)
    yield Kind("lo.proxygid.own.15008", "own", 15008, by_gid)
    yield Kind("lo.proxygid.lo5", "lo5", 8080, by_gid)
    yield Kind("lo.appgid.own", "own", 8080, (1000, config.policy.proxy_gid))
    yield Kind("lo.proxy.validation", "src6", 15002, (config.policy.proxy_uid, config.policy.proxy_gid), source="lo")
    for who, ids in (("app", APP), ("proxy", proxy), ("proxygid", by_gid)):
        yield Kind(f"lo.{who}.own.src6", "own", 8080, ids, source="src6")
    yield Kind("lo.proxy.own.from-own", "own", 8080, proxy, source="own")
    yield Kind("lo.proxy.any.from-own", "any", 8080, proxy, source="own")
    yield Kind("lo.app.any.from-own", "any", 8080, source="own")
    yield Kind("lo.proxy.own.any-port", "own", 8080, proxy, source="any", options=(("source_port", 25004),))
    yield Kind("lo.app.own.any-port", "own", 8080, source="any", options=(("source_port", 25005),))
    yield Kind("lo.proxy.own.53", "own", 53, proxy)
    yield Kind("lo.proxygid.own.53", "own", 53, by_gid)


def _inbound() -> Iterator[Kind]:
    peer, beyond = (("place", "peer"),), (("place", "beyond"),)
    for port in (22, 80, 443, 8080, 9999, 15001, 15006, 15008, 15020, 15021, 15090):
        yield Kind(f"in.{port}", "own", port, ROOT, "4 6", options=peer)
    yield Kind("in.own2", "own2", 8080, ROOT, "4 6", options=peer)
    yield Kind("in.eth1", "own-eth1", 8080, ROOT, "4 6", options=beyond)
    yield Kind("in.eth1.by-eth0", "own-eth1-by-eth0", 8080, ROOT, "4 6", options=peer)
    yield Kind("in.udp.80", "own", 80, ROOT, "4 6", options=(("protocol", "udp"), *peer))
    held = (("source_port", 25006), ("held", True), *peer)
    yield Kind("in.one-port-two-addresses", "own", 8080, ROOT, "4 6", more=("own2",), source="any", options=held)
    yield Kind("transit", "behind-eth1", 80, ROOT, "4 6", options=peer)


def _dns(config: Config) -> Iterator[Kind]:
    by_uid, by_gid = (config.policy.proxy_uid, 2000), (0, config.policy.proxy_gid)
    for who, ids in (("app", APP), ("root", ROOT), ("proxy", config.ids), ("proxyuid", by_uid), ("proxygid", by_gid)):
        yield Kind(f"dns.tcp.{who}", "remote", 53, ids)
        for how in ("connected", "unconnected"):
            yield Kind(f"dns.udp.{who}.{how}", "remote", 53, ids, options=(("protocol", "udp"), ("how", how)))
    for to in ("lo", "resolver", "any", "own", "own2", "peer", "beyond"):
        yield Kind(f"dns.tcp.app.{to}", to, 53)
        for how in ("connected", "unconnected"):
            yield Kind(f"dns.udp.app.{to}.{how}", to, 53, options=(("protocol", "udp"), ("how", how)))
    several = (("protocol", "udp"), ("how", "unconnected"))
    yield Kind("dns.udp.app.two-nameservers", "remote", 53, more=("remote2",), options=several)
    yield Kind("dns.udp.app.three-nameservers", "remote", 53, more=("remote2", "lo"), options=several)
    bound = (("protocol", "udp"), ("source_port", 25007))
    yield Kind("dns.udp.app.from-own", "remote", 53, source="own", options=(*bound, ("how", "unconnected")))
    yield Kind("dns.udp.app.any-port", "remote", 53, source="any", options=(*bound, ("how", "unconnected")))


def _routes(config: Config) -> Iterator[Kind]:
    """What the kernel asks the routes for, before or without any rule."""
    nowhere = ("remote", "unreachable", "prohibited", "blackhole", "multicast", "broadcast", "everybody")
    for to in nowhere:
        yield Kind(f"route.{to}.app", to, 80)
        yield Kind(f"route.{to}.proxy", to, 80, config.ids)
        yield Kind(f"route.{to}.tcp-53", to, 53)
    for to in ("remote", "unreachable", "prohibited", "blackhole"):
        for how in ("connected", "unconnected"):
            yield Kind(f"route.{to}.udp-53.{how}", to, 53, options=(("protocol", "udp"), ("how", how)))
    for source in ("lo", "lo5", "src6"):
        yield Kind(f"route.from-{source}", "remote", 80, families="4 mapped", source=source)
        yield Kind(f"route.from-{source}.peer", "peer", 8080, families="4 mapped", source=source)
        yield Kind(f"route.from-{source}.unreachable", "unreachable", 80, families="4 mapped", source=source)
        for how in ("connected", "unconnected"):
            udp = (("protocol", "udp"), ("how", how))
            yield Kind(f"route.from-{source}.udp-53.{how}", "remote", 53, families="4", source=source, options=udp)
    for who, ids in (("app", APP), ("proxy", config.ids), ("proxygid", (0, config.policy.proxy_gid))):
        yield Kind(f"route.local.{who}", "local-route", 8080, ids)
        yield Kind(f"route.local.{who}.15008", "local-route", 15008, ids)
        yield Kind(f"route.local.{who}.53", "local-route", 53, ids)
        yield Kind(f"route.local.{who}.src6", "local-route", 8080, ids, source="src6")
    yield Kind("route.local.in", "local-route", 8080, ROOT, "4 6", options=(("place", "peer"),))


def _original_source(config: Config) -> Iterator[Kind]:
    """TPROXY: the proxy on its way to the application, with the client's address and mark."""
    marked = (("mark", 1337),)
    for to in ("own", "own2", "own-eth1"):
        yield Kind(f"tproxy.to-app.{to}", to, 8080, config.ids, "4 6", source="remote", options=marked)
    yield Kind("tproxy.to-app.15008", "own", 15008, config.ids, "4 6", source="remote", options=marked)
    yield Kind("tproxy.to-nobody", "own", 9999, config.ids, "4 6", source="remote", options=marked)
