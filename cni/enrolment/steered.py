"""Whether inbound connections of enrolled pods are steered to their proxies: what the kernel says of it now.

A pin is only a hint where to look. If a pod's pinned link is missing or dead, its namespace itself is asked.
"""

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path

from bpf import links
from bpf.errors import KernelRefused
from bpf.pins import Pins
from bpf.steering import load_instance
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from cni.enrolment.entries import Identity
from cni.netns.namespaces import NoProcfs, find_netns, missing_rights


class Steering(StrEnum):
    """The states of a pod's inbound steering, by the words that every command uses."""

    STEERED = "steered"
    NOT_STEERED = "not steered"
    GONE = "namespace gone"
    UNKNOWN = "unknown"

    @property
    def is_open(self) -> bool:
        """Whether inbound connections pass by the proxy, or may do so."""
        return self in (Steering.NOT_STEERED, Steering.UNKNOWN)

    @property
    def words(self) -> str:
        """The state with what it means for connections."""
        if self is Steering.NOT_STEERED:
            return f"{self}: inbound reaches the application"
        return f"{self}: the pod's namespace can't be looked at" if self is Steering.UNKNOWN else str(self)


def steering_of(pins: Pins, tables: Tables, cookies: Collection[int], proc: Path) -> dict[int, Steering]:
    """How each of these pods is steered. `proc` is a procfs of the node. It is walked only if a pinned link is missing.

    If it can't be walked, pods without a living pinned link are UNKNOWN.
    """
    our_maps = tables.ids()
    steered = links.steered_pods(pins, our_maps)
    found = {cookie: Steering.STEERED for cookie in cookies if cookie in steered}
    lost = set(cookies) - steered
    if lost:
        found |= dict.fromkeys(lost, Steering.UNKNOWN if missing_rights() else Steering.GONE)
        try:
            with find_netns(lost, proc=proc) as namespaces:
                found |= {cookie: _asked(netns, our_maps) for cookie, netns in namespaces}
        except (OSError, NoProcfs):
            found |= dict.fromkeys(lost, Steering.UNKNOWN)
    return found


def steer_again(pins: Pins, tables: Tables, proc: Path) -> list[str]:
    """Give a link to each enrolled pod that is not steered; returns their names. For nodes without a running agent.

    Raises KernelRefused.
    """
    entered = {key.cookie: pod for key, pod in tables.pods.every()}
    states = steering_of(pins, tables, entered, proc)
    lost = {cookie for cookie, state in states.items() if state is Steering.NOT_STEERED}
    steered = []
    maps = tables.descriptors()
    with find_netns(lost, proc=proc) as namespaces:
        for cookie, netns in namespaces:
            links.unlink_pod(pins, cookie)
            with Descriptor(load_instance(maps, cookie)) as instance:
                is_made = links.link_pod(pins, cookie, netns, instance.fd)
            if is_made:
                steered.append(str(Identity.of(entered[cookie])))
    return sorted(steered)


def _asked(netns: int, our_maps: Collection[int]) -> Steering:
    try:
        return Steering.STEERED if links.is_steered(netns, our_maps) else Steering.NOT_STEERED
    except KernelRefused:
        return Steering.UNKNOWN
