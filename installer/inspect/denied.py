"""What pods deny, what that has refused, and which connections are older than it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpf.layout import TOTALS, Cookie, PodFlags, PortRule, Tally
from bpf.links import linked_pods
from bpf.pins import Pins
from bpf.tables import Tables
from cni.closing import Denied, close_denied
from cni.entries import Identity
from cni.namespaces import find
from cni.processes import Crowd, crowds
from installer.inspect.names import cookie_of


@dataclass(frozen=True)
class Denier:
    """A pod that denies ports."""

    cookie: int
    identity: Identity
    denied: Denied
    refused: dict[str, int]  # by direction

    def document(self) -> dict[str, Any]:
        """In plain values."""
        return {
            "pod": str(self.identity),
            "outbound": sorted(self.denied.outbound),
            "inbound": sorted(self.denied.inbound),
            "refused": self.refused,
        }


def deniers(tables: Tables, name: str | None) -> list[Denier]:
    """Every pod that denies ports, or the one of that name if it does. Raises NoSuchPod."""
    only = cookie_of(tables, name) if name else None
    wanted = {
        key.cookie: Identity.of(pod)
        for key, pod in tables.pods.every()
        if pod.flags & PodFlags.DENIES and only in (None, key.cookie)
    }
    ports: dict[int, list[set[int]]] = {cookie: [set(), set()] for cookie in wanted}
    for key, value in tables.port_rules.every() if wanted else ():
        for index, rule in enumerate((PortRule.DENY_OUTBOUND, PortRule.DENY_INBOUND)):
            if key.cookie in ports and value.word & rule:
                ports[key.cookie][index].add(key.port)
    own: dict[int, set[Any]] = {cookie: set() for cookie in wanted}
    for address, owner in tables.addresses.every() if wanted else ():
        if owner.cookie in own:
            own[owner.cookie].add(address.ip())
    found = []
    for cookie, identity in wanted.items():
        outbound, inbound = map(frozenset, ports[cookie])
        denied = Denied(outbound, inbound, frozenset(own[cookie]))
        found.append(Denier(cookie, identity, denied, _refused(tables, cookie)))
    return sorted(found, key=lambda each: str(each.identity))


def _refused(tables: Tables, cookie: int) -> dict[str, int]:
    sums = (tables.tallies.get(Cookie(cookie)) or Tally()).connections
    return {direction: sums[index] for index, (direction, verdict) in enumerate(TOTALS) if verdict == "denied"}


def kill(pins: Pins, pods: list[Denier], proc: Path) -> Iterator[tuple[Denier, list[str]]]:
    """Reset the connections that each would not let begin any more, with their destinations. Raises OSError."""
    inodes = {cookie: inode for cookie, inode in linked_pods(pins) if inode}
    by_cookie = {each.cookie: each for each in pods if each.cookie in inodes}
    inhabited = crowds(proc)
    with find(by_cookie, [inodes[cookie] for cookie in by_cookie], proc) as found:
        for cookie, netns in found:
            crowd = inhabited.get(inodes[cookie], Crowd(inodes[cookie]))
            yield by_cookie[cookie], close_denied(netns, crowd, by_cookie[cookie].denied, proc)


def table_of(pods: list[Denier]) -> str:
    """For people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    if not pods:
        return "no pod denies ports\n"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("pod", "denied outbound", "refused", "denied inbound", "refused"):
        table.add_column(title, justify="right" if title == "refused" else "left", overflow="fold")
    for each in pods:
        outbound, inbound = (",".join(map(str, sorted(ports))) for ports in (each.denied.outbound, each.denied.inbound))
        table.add_row(
            str(each.identity), outbound, str(each.refused["outbound"]), inbound, str(each.refused["inbound"])
        )
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
