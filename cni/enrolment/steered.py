"""Whether inbound connections of enrolled pods are steered to their proxies: what the kernel says of it now.

A pin is only a hint where to look. If a pod's pinned link is missing or dead, its namespace itself is asked.
"""

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path

from bpf import links
from bpf.errors import KernelRefused
from bpf.pins import Pins
from bpf.tables import Tables
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
    steered = links.steered_pods(pins, tables.inbound_id)
    found = {cookie: Steering.STEERED for cookie in cookies if cookie in steered}
    lost = set(cookies) - steered
    if lost:
        found |= dict.fromkeys(lost, Steering.UNKNOWN if missing_rights() else Steering.GONE)
        try:
            with find_netns(lost, proc=proc) as namespaces:
                found |= {cookie: _asked(netns, tables.inbound_id) for cookie, netns in namespaces}
        except (OSError, NoProcfs):
            found |= dict.fromkeys(lost, Steering.UNKNOWN)
    return found


def _asked(netns: int, inbound_id: int) -> Steering:
    try:
        return Steering.STEERED if links.is_steered(netns, inbound_id) else Steering.NOT_STEERED
    except KernelRefused:
        return Steering.UNKNOWN
