"""The kinds of connections: who connects from where to what, for each family in which that makes sense."""

from collections.abc import Iterator

from tests.conformance.configs import NEIGHBOUR, Config
from tests.conformance.probe import APP, ROOT, Kind, Probe


def probes_of(config: Config) -> list[Probe]:
    """Everything to try on a pod. Families that it has no addresses of are left out, unless that is the point."""
    policy = config.policy
    kinds = [*_outbound(config), *_loopback(config), *_inbound(), *_spread(config), *_fast_open(config)]
    kinds += [*_shared(config), *_dns(config), *_routes(config)]
    if policy.mode == "TPROXY" and config.ids[0] == 0:
        kinds += _original_source(config)
    probes = [probe for kind in kinds for probe in kind.probes()]
    own = [each for each in probes if each.version in config.families or each.kind.startswith("route.remote")]
    return own + [probe for kind in neighbours() for probe in kind.probes()]


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


def _spread(config: Config) -> Iterator[Kind]:
    """So many connections at the same time that they do not all get to one worker by chance."""
    many = (("how", "spread"), ("held", True))
    yield Kind("out.app.many", "remote", 80, more=("remote",) * 15, options=many)
    yield Kind("in.many", "own", 8080, ROOT, "4 6", more=("own",) * 15, options=(*many, ("place", "peer")))
    yield Kind("lo.proxy.own.many", "own", 8080, config.ids, more=("own",) * 15, options=many)


def _fast_open(config: Config) -> Iterator[Kind]:
    """TCP Fast Open: data arrive before the connection is established. The first connection brings the cookie."""
    peer = ("place", "peer")
    for how in ("fastopen", "fastopen-connect"):
        way = ("how", how)
        yield Kind(f"out.app.{how}", "remote", 80, more=("remote",), options=(way,))
        yield Kind(f"out.app.{how}.two-remotes", "remote", 80, more=("remote", "remote2", "remote2"), options=(way,))
        yield Kind(f"out.app.{how}.from-own2", "remote", 80, more=("remote",), source="own2", options=(way,))
        yield Kind(f"out.proxy.{how}", "remote", 80, config.ids, more=("remote",), options=(way,))
        yield Kind(f"lo.proxy.own.{how}", "own", 8080, config.ids, more=("own",), options=(way,))
        yield Kind(f"dns.tcp.app.{how}", "remote", 53, more=("remote",), options=(way,))
        for port in (8080, 15008, 15020):
            yield Kind(f"in.{port}.{how}", "own", port, ROOT, "4 6", more=("own",), options=(way, peer))


def _shared(config: Config) -> Iterator[Kind]:
    """Another pod of the node has some of the pod's addresses: each is judged by its own rules."""
    for port in (80, 8080, 15020):
        yield Kind(f"in.shared.{port}", "shared", port, ROOT, "4", options=(("place", "peer"),))
        yield Kind(f"in.link-local.{port}", "link-local", port, ROOT, "6", options=(("place", "peer"),))
    yield Kind("in.udp.shared", "shared", 80, ROOT, "4", options=(("place", "peer"), ("protocol", "udp")))
    for port in (80, 443, 8080):
        yield Kind(f"out.app.neighbour.{port}", "neighbour", port)
    yield Kind("lo.app.shared", "shared", 8080)
    yield Kind("lo.proxy.shared", "shared", 8080, config.ids)


def neighbours() -> Iterator[Kind]:
    """The other pod, from outside and from inside."""
    proxy, whose = NEIGHBOUR.ids, ("whose", "neighbour")
    outside, inside = (whose, ("place", "beyond")), (whose, ("place", "neighbour"))
    for to in ("neighbour", "shared", "neighbours-link-local", "own2"):
        for port in (80, 8080, 15020):
            yield Kind(f"neighbour.in.{to}.{port}", to, port, ROOT, "4 6", options=outside)
    for port in (80, 443, 8080):
        yield Kind(f"neighbour.out.app.{port}", "across", port, options=inside)
        yield Kind(f"neighbour.out.proxy.{port}", "across", port, proxy, options=inside)
        yield Kind(f"neighbour.out.1337.{port}", "across", port, (1337, 1337), options=inside)
    yield Kind("neighbour.out.app.own", "own", 443, options=inside)
    for to in ("neighbour", "shared", "own2"):
        yield Kind(f"neighbour.lo.app.{to}", to, 8080, options=inside)
        yield Kind(f"neighbour.lo.proxy.{to}", to, 8080, proxy, options=inside)
        yield Kind(f"neighbour.lo.1337.{to}", to, 8080, (1337, 1337), options=inside)


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
