"""Reads the ports that pods deny and how many connections they have refused, and resets older connections."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bpf.layout import TOTALS, Cookie, PodFlags, TallyEntry
from bpf.pins import Pins
from bpf.tables import Tables
from cni.netns.namespaces import find_netns, why_absent
from cni.netns.processes import Crowd, crowds
from installer.commands.deny.closing import Closed, Denied, close_denied
from installer.commands.pods.enrolled_pods import EnrolledPod, every, find_pod


def deniers(pins: Pins, tables: Tables, name: str | None) -> list[EnrolledPod]:
    """The pods that deny ports. With `name`: that pod alone, or none if it denies no port. Raises NoSuchPod."""
    some = [find_pod(pins, tables, name)] if name else every(pins, tables)
    return [pod for pod in some if PodFlags.DENIES in pod.flags]


def denial_document(pod: EnrolledPod, tables: Tables) -> dict[str, Any]:
    """The ports that one pod denies, and the number of connections it refused."""
    sums = (tables.tallies.get(Cookie(pod.cookie)) or TallyEntry()).connections
    return {
        "pod": str(pod.identity),
        "namespace": pod.identity.namespace,
        "name": pod.identity.name,
        "outbound": sorted(pod.policy.deny_outbound_ports),
        "inbound": sorted(pod.policy.deny_inbound_ports),
        "refused": {direction: sums[index] for index, (direction, verdict) in enumerate(TOTALS) if verdict == "denied"},
    }


def kill(pods: list[EnrolledPod], proc: Path) -> Iterator[tuple[EnrolledPod, Closed]]:
    """Reset each pod's open connections that it would refuse now. Raises OSError, NoProcfs."""
    left = {each.cookie: each for each in pods}
    known = {each.inode for each in pods}
    with find_netns(left.keys(), known if 0 not in known else None, proc) as found:
        inhabited: dict[int, Crowd] | None = None
        for cookie, netns in found:
            inhabited = crowds(proc) if inhabited is None else inhabited
            inode = os.fstat(netns).st_ino
            pod = left.pop(cookie)
            denied = Denied(pod.policy.deny_outbound_ports, pod.policy.deny_inbound_ports, pod.addresses)
            yield pod, close_denied(netns, inhabited.get(inode, Crowd(inode)), denied, proc)
    for pod in left.values():
        yield pod, Closed(problem=why_absent(proc))


def denials_table(documents: list[dict[str, Any]], name: str | None, has_titles: bool = True) -> str:
    """The table for people. `name` is the pod that the user asked for."""
    if not (documents or has_titles):
        return ""
    if not documents:
        return f"{name} denies no ports\n" if name else "no pod denies ports\n"
    from installer.commands.printing import rendered, table

    titles = ("namespace", "name", "outbound", "refused", "inbound", "refused")
    texts = ("namespace", "name", "outbound", "inbound")
    return rendered(table(titles, map(_row, documents), texts, has_titles))


def _row(document: dict[str, Any]) -> tuple[object, ...]:
    outbound, inbound = (",".join(map(str, document[direction])) for direction in ("outbound", "inbound"))
    name = document["namespace"], document["name"]
    return *name, outbound, document["refused"]["outbound"], inbound, document["refused"]["inbound"]
