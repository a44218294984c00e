"""Selects the events that the user wants to see."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network

from bpf.errors import SidestepError
from bpf.layout import RULES, Event, EventKind
from installer.commands.trace.told_events import counted_as

Network = IPv4Network | IPv6Network

_LISTENERS = (EventKind.LISTENING, EventKind.CLOSED)
_MAPPED = 96  # bits of ::ffff:0:0/96


class BadFilter(SidestepError):
    """The text of --dest is not a destination."""


@dataclass(frozen=True)
class Wanted:
    """Selects events. None matches everything. `port` is in host order."""

    network: Network | None = None
    port: int | None = None
    verdict: str | None = None
    direction: str | None = None
    rule: int | None = None  # its place in layout.RULES
    is_inverted: bool = False  # whether the others are wanted

    @classmethod
    def of(
        cls,
        destination: str | None,
        verdict: str | None,
        port: int | None = None,
        direction: str | None = None,
        rule: str | None = None,
        is_inverted: bool = False,
    ) -> "Wanted":
        """From the command line: `10.0.0.0/8`, `10.1.2.3:80`, `[fd00::1]:80` or `:80`. Raises BadFilter.

        `rule` is one of layout.RULES.
        """
        number = None if rule is None else RULES.index(rule)
        further = verdict, direction, number, is_inverted
        if destination is None:
            return cls(None, port, *further)
        try:
            network, own_port = _parsed(destination)
            if port is not None and own_port not in (None, port):
                raise BadFilter(f'"{destination}" has port {own_port}, and --port says {port}; give one of them')
            return cls(network, own_port if port is None else port, *further)
        except ValueError:
            raise BadFilter(
                f'"{destination}" is not a destination; give 10.0.0.0/8, 10.1.2.3:80, [fd00::1]:80 or :80'
            ) from None

    def takes(self, event: Event) -> bool:
        """Whether an event is selected. Killed processes have no verdict. "refused" selects listeners too."""
        return self._fits(event) != self.is_inverted

    def _fits(self, event: Event) -> bool:
        if (self.direction or self.rule is not None) and event.kind > EventKind.INBOUND:
            return False
        if self.direction and counted_as(event.verdict)[0] != self.direction:
            return False
        if self.rule is not None and event.rule != self.rule:
            return False
        if self.verdict and not self._takes_verdict(event):
            return False
        if self.port is not None and event.destination_port != self.port:
            return False
        return self.network is None or event.destination.ip() in self.network

    def _takes_verdict(self, event: Event) -> bool:
        if event.kind in _LISTENERS:
            return self.verdict == "refused"
        return event.kind <= EventKind.INBOUND and counted_as(event.verdict)[1] == self.verdict


def _parsed(text: str) -> tuple[Network | None, int | None]:
    """The network and port of a destination. Raises ValueError."""
    host, port = _split(text)
    network = ip_network(host, strict=False) if host is not None else None
    return network and _unmapped(network), None if port is None else _port(port)


def _split(text: str) -> tuple[str | None, str | None]:
    """Host and port. An IPv6 address needs brackets if a port follows. Raises ValueError."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or rest[:1] not in ("", ":"):
            raise ValueError(text)
        return host, rest[1:] if rest else None
    if text.count(":") != 1:
        return text, None
    host, _, port = text.partition(":")
    return host or None, port


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 0xFFFF):
        raise ValueError(text)
    return int(text)


def _unmapped(network: Network) -> Network:
    """The IPv4 network of an IPv4-mapped one: events show ::ffff:10.0.0.1 as 10.0.0.1."""
    if isinstance(network, IPv4Network) or network.prefixlen < _MAPPED:
        return network
    ip4: IPv4Address | None = network.network_address.ipv4_mapped
    return network if ip4 is None else IPv4Network((ip4, network.prefixlen - _MAPPED))
