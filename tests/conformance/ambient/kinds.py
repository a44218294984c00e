"""The kinds of connections of and to a pod in ambient mode, for each family in which that makes sense."""

import random
from collections.abc import Iterator

from tests.conformance.configs import AmbientConfig
from tests.conformance.kinds import neighbours
from tests.conformance.probe import APP, ROOT, Kind, Probe

ZTUNNEL, TO_APPLICATION = 0x539, 0x111
_PORTS = (22, 53, 80, 443, 5555, 8080, 15001, 15006, 15008, 15020, 15021, 15090)
_GENERATED = 200


def probes_of(config: AmbientConfig) -> list[Probe]:
    """Everything to try on a pod. Families that it has no addresses of are left out, unless that is the point."""
    kinds = [
        *_outbound(),
        *_loopback(),
        *_marked(),
        *_ztunnels(),
        *_inbound(),
        *_dns(),
        *_routes(),
        *_generated(config),
    ]
    probes = [probe for kind in kinds for probe in kind.probes()]
    own = [each for each in probes if each.version in config.families or each.kind.startswith("route.remote")]
    if not config.has_default_route:  # where a marked socket is routed to is not known: docs/semantics.md
        own = [each for each in own if not each.mark or each.place == "ztunnel"]
    return own + [probe for kind in neighbours() for probe in kind.probes()]


def _outbound() -> Iterator[Kind]:
    for port in _PORTS:
        yield Kind(f"out.app.{port}", "remote", port)
    for to in ("remote2", "peer", "beyond", "behind-eth1", "neighbour"):
        yield Kind(f"out.app.{to}", to, 8080)
    yield Kind("out.root", "remote", 80, ROOT)
    yield Kind("out.1337", "remote", 80, (1337, 1337))
    yield Kind("out.opened-by-root-connected-by-app", "remote", 80, ROOT, options=(("connector", APP),))
    yield Kind("out.app.from-own", "remote", 80, source="own")
    yield Kind("out.app.from-own2", "remote", 80, source="own2")
    yield Kind("out.app.from-own-port", "remote", 80, source="own", options=(("source_port", 25001),))
    yield Kind("out.app.from-any-port", "remote", 80, source="any", options=(("source_port", 25002),))
    for how in ("connected", "unconnected"):
        yield Kind(f"udp.app.80.{how}", "remote", 80, options=(("protocol", "udp"), ("how", how)))
    for how in ("fastopen", "fastopen-connect"):
        yield Kind(f"out.app.{how}", "remote", 80, more=("remote",), options=(("how", how),))
        yield Kind(
            f"out.app.{how}.two-remotes", "remote", 80, more=("remote", "remote2", "remote2"), options=(("how", how),)
        )


def _loopback() -> Iterator[Kind]:
    for to in ("lo", "lo5", "lo123", "any", "own", "own2", "own-eth1", "shared"):
        yield Kind(f"lo.app.{to}", to, 8080)
        yield Kind(f"lo.root.{to}", to, 8080, ROOT)
    for port in (80, 15001, 15006, 15008, 15020, 9999):
        yield Kind(f"lo.app.own.{port}", "own", port)
        yield Kind(f"lo.app.lo.{port}", "lo", port)
    for port in (15001, 15006):
        yield Kind(f"lo.app.lo5.{port}", "lo5", port)
    yield Kind("lo.app.any.from-own", "any", 8080, source="own")
    yield Kind("lo.app.own.any-port", "own", 8080, source="any", options=(("source_port", 25005),))


def _marked() -> Iterator[Kind]:
    """Marks that somebody in the pod sets, who is not ztunnel."""
    for mark in (1, ZTUNNEL, TO_APPLICATION, 0x1539, 0x5390):
        for to, port in (("remote", 80), ("remote", 53), ("own", 8080), ("lo", 8080), ("own", 53)):
            yield Kind(f"marked.{mark:#x}.{to}.{port}", to, port, ROOT, options=(("mark", mark),))
        for how in ("connected", "unconnected"):
            udp = (("mark", mark), ("protocol", "udp"), ("how", how))
            yield Kind(f"marked.{mark:#x}.udp-53.{how}", "remote", 53, ROOT, options=udp)


def _ztunnels() -> Iterator[Kind]:
    """What ztunnel opens in the pod: its ways out, and those to the application."""
    for mark in (ZTUNNEL, 0xA539):
        own = (("place", "ztunnel"), ("mark", mark))
        for port in (53, 80, 15001, 15008):
            yield Kind(f"ztunnel.{mark:#x}.out.{port}", "remote", port, ROOT, options=own)
        yield Kind(f"ztunnel.{mark:#x}.out.eth1", "beyond", 80, ROOT, options=own)
        for to in ("own", "own2", "own-eth1", "lo", "any", "shared"):
            yield Kind(f"ztunnel.{mark:#x}.to-app.{to}", to, 8080, ROOT, "4 6", options=own)
            yield Kind(f"ztunnel.{mark:#x}.to-nobody.{to}", to, 9999, ROOT, "4 6", options=own)
        for to in ("own", "own2", "own-eth1"):
            for client in ("remote", "peer", "beyond"):
                kind = f"ztunnel.{mark:#x}.original-source.{client}.{to}"
                yield Kind(kind, to, 8080, ROOT, "4 6", source=client, options=own)
        yield Kind(f"ztunnel.{mark:#x}.original-source.15020", "own", 15020, ROOT, "4 6", source="peer", options=own)
        yield Kind(f"ztunnel.{mark:#x}.original-source.nobody", "own", 9999, ROOT, "4 6", source="peer", options=own)
        yield Kind(f"ztunnel.{mark:#x}.own-source", "own", 8080, ROOT, "4 6", source="own2", options=own)
        for how in ("connected", "unconnected"):
            udp = (*own, ("protocol", "udp"), ("how", how))
            yield Kind(f"ztunnel.{mark:#x}.udp-53.{how}", "remote", 53, ROOT, options=udp)


def _inbound() -> Iterator[Kind]:
    peer, beyond = (("place", "peer"),), (("place", "beyond"),)
    for port in (*_PORTS, 9999):
        yield Kind(f"in.{port}", "own", port, ROOT, "4 6", options=peer)
    for to in ("own2", "shared", "link-local"):
        yield Kind(f"in.{to}", to, 8080, ROOT, "4 6", options=peer)
    yield Kind("in.eth1", "own-eth1", 8080, ROOT, "4 6", options=beyond)
    yield Kind("in.eth1.15008", "own-eth1", 15008, ROOT, "4 6", options=beyond)
    yield Kind("in.eth1.by-eth0", "own-eth1-by-eth0", 8080, ROOT, "4 6", options=peer)
    yield Kind("in.udp.80", "own", 80, ROOT, "4 6", options=(("protocol", "udp"), *peer))
    for mark in (ZTUNNEL, TO_APPLICATION):  # it does not travel
        yield Kind(f"in.marked.{mark:#x}", "own", 8080, ROOT, "4 6", options=(("mark", mark), *peer))
    for how in ("fastopen", "fastopen-connect"):
        for port in (8080, 15008):
            yield Kind(f"in.{port}.{how}", "own", port, ROOT, "4 6", more=("own",), options=(("how", how), *peer))
    yield Kind("transit", "behind-eth1", 80, ROOT, "4 6", options=peer)


def _dns() -> Iterator[Kind]:
    for to in ("remote", "lo", "resolver", "any", "own", "own2", "peer", "beyond"):
        yield Kind(f"dns.tcp.app.{to}", to, 53)
        for how in ("connected", "unconnected"):
            yield Kind(f"dns.udp.app.{to}.{how}", to, 53, options=(("protocol", "udp"), ("how", how)))
    several = (("protocol", "udp"), ("how", "unconnected"))
    yield Kind("dns.udp.app.two-nameservers", "remote", 53, more=("remote2",), options=several)
    yield Kind("dns.udp.app.from-own", "remote", 53, source="own", options=(("source_port", 25007), *several))


def _routes() -> Iterator[Kind]:
    for to in ("remote", "unreachable", "prohibited", "blackhole", "multicast", "broadcast", "everybody"):
        yield Kind(f"route.{to}.app", to, 80)
        yield Kind(f"route.{to}.tcp-53", to, 53)
    for to in ("remote", "unreachable", "prohibited", "blackhole"):
        for how in ("connected", "unconnected"):
            yield Kind(f"route.{to}.udp-53.{how}", to, 53, options=(("protocol", "udp"), ("how", how)))
    for source in ("lo", "lo5"):
        yield Kind(f"route.from-{source}", "remote", 80, families="4 mapped", source=source)
    yield Kind("route.local.app", "local-route", 8080)
    yield Kind("route.local.app.53", "local-route", 53)
    yield Kind("route.local.in", "local-route", 8080, ROOT, "4 6", options=(("place", "peer"),))


def _generated(config: AmbientConfig) -> Iterator[Kind]:
    """What nobody has thought of: the same in each run, and another in each configuration."""
    chosen = random.Random(config.name)
    targets = (
        "remote",
        "remote2",
        "peer",
        "beyond",
        "behind-eth1",
        "neighbour",
        "own",
        "own2",
        "own-eth1",
        "lo",
        "lo5",
    )
    for number in range(_GENERATED):
        place = chosen.choice(("pod", "pod", "ztunnel", "peer"))
        to = chosen.choice(targets if place != "peer" else ("own", "own2"))
        udp = chosen.random() < 0.2
        port = chosen.choice((53, 80)) if udp else chosen.choice((*_PORTS, 9999))
        options: list[tuple[str, object]] = [("place", place)]
        if udp:
            options += [("protocol", "udp"), ("how", chosen.choice(("connected", "unconnected")))]
        if place == "ztunnel":
            options.append(("mark", chosen.choice((ZTUNNEL, 0xF539))))
        elif chosen.random() < 0.2:
            options.append(("mark", chosen.choice((ZTUNNEL, TO_APPLICATION, chosen.randrange(1, 1 << 31)))))
        ids = ROOT if dict(options).get("mark") else chosen.choice((APP, ROOT, (1337, 1337)))
        families = chosen.choice(("4", "6", "mapped" if place != "peer" else "4"))
        yield Kind(f"generated.{number}", to, port, ids, families, options=tuple(options))
