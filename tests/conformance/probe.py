"""One connection that a prober makes, and a kind of connection: the same one in each family that has its addresses."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Family = Literal["4", "6", "mapped"]
Ids = tuple[int, int]
# UDP: how a socket asks. TCP: spread over the proxy's workers; or with TCP Fast Open, by sendto() or by connect() and
# send(), which put data into the SYN once an earlier connection has brought a cookie.
How = Literal["connected", "unconnected", "spread", "fastopen", "fastopen-connect"]
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
    "shared": ("172.17.0.1", ""),
    "link-local": ("", "fe80::1%eth0"),
    "neighbours-link-local": ("", "fe80::1%eth2"),
    "neighbour": ("10.22.0.2", "fd22::2"),
    "across": ("10.22.0.1", "fd22::1"),
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
    # "ztunnel" is in the pod's network namespace, and in ztunnel's cgroup
    place: Literal["pod", "peer", "beyond", "neighbour", "ztunnel"] = "pod"
    whose: Literal["pod", "neighbour"] = "pod"  # rules decide
    protocol: Literal["tcp", "udp"] = "tcp"
    how: How = "connected"
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
        """4 or 6: what leaves the socket."""
        return 6 if self.family == "6" else 4

    @property
    def is_from_outside(self) -> bool:
        """Whether it comes to the pod whose rules decide, rather than from a process in it."""
        return self.place not in (self.whose, "ztunnel")

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
