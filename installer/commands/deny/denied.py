"""What pods deny, what that has refused, and which connections are older than it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpf.layout import TOTALS, Cookie, PodFlags, PortRule, TallyEntry
from bpf.links import linked_pods
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.entries import Identity
from cni.netns.namespaces import find_netns, why_absent
from cni.netns.processes import Crowd, crowds
from installer.commands.deny.closing import Closed, Denied, close_denied
from installer.commands.names import cookie_of


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
    for each in tables.addresses.every_key() if wanted else ():
        if each.cookie in own:
            own[each.cookie].add(each.address.ip())
    found = []
    for cookie, identity in wanted.items():
        outbound, inbound = map(frozenset, ports[cookie])
        denied = Denied(outbound, inbound, frozenset(own[cookie]))
        found.append(Denier(cookie, identity, denied, _refused(tables, cookie)))
    return sorted(found, key=lambda each: str(each.identity))


def _refused(tables: Tables, cookie: int) -> dict[str, int]:
    sums = (tables.tallies.get(Cookie(cookie)) or TallyEntry()).connections
    return {direction: sums[index] for index, (direction, verdict) in enumerate(TOTALS) if verdict == "denied"}


def kill(pins: Pins, pods: list[Denier], proc: Path) -> Iterator[tuple[Denier, Closed]]:
    """Reset the connections that each would not let begin any more. Raises OSError, NoProcfs."""
    inodes = dict(linked_pods(pins))
    left = {each.cookie: each for each in pods}
    known = {inodes.get(cookie, 0) for cookie in left}
    with find_netns(left.keys(), known if 0 not in known else None, proc) as found:
        inhabited: dict[int, Crowd] | None = None
        for cookie, netns in found:
            inhabited = crowds(proc) if inhabited is None else inhabited
            inode = os.fstat(netns).st_ino
            pod = left.pop(cookie)
            yield pod, close_denied(netns, inhabited.get(inode, Crowd(inode)), pod.denied, proc)
    for pod in left.values():
        yield pod, Closed(problem=why_absent(proc))


def denials_table(pods: list[Denier], name: str | None) -> str:
    """For people; `name` is the pod that was asked for."""
    if not pods:
        return f"{name} denies no ports\n" if name else "no pod denies ports\n"
    from installer.commands.printing import rendered, table

    titles = ("pod", "denied outbound", "refused", "denied inbound", "refused")
    return rendered(table(titles, map(_row, pods), ("pod", "denied outbound", "denied inbound")))


def _row(pod: Denier) -> tuple[object, ...]:
    outbound, inbound = (",".join(map(str, sorted(ports))) for ports in (pod.denied.outbound, pod.denied.inbound))
    return str(pod.identity), outbound, pod.refused["outbound"], inbound, pod.refused["inbound"]
