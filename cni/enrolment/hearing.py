"""Registers a proxy's listening sockets that the programs have not seen begin to listen.

sockops.c registers the sockets that the proxy binds after its pod was enrolled. The others are looked for when a pod is
adopted, when a strict proxy's container becomes known, and when registered sockets have closed, as those of a proxy's
predecessor do.
"""

import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import structlog

from bpf.errors import KernelRefused, NotAttached
from bpf.iterator import SocketIterator
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT, slots_of
from bpf.pins import Pins
from cni.enrolment.enroll import Enrolments
from cni.netns.listeners import FAMILIES, Listener, Proxy, Ztunnel, by_iterator, by_processes, on_proxys_ports
from cni.netns.proc_net import SocketRow
from cni.netns.sandbox import visit
from cni.netns.sock_diag import TcpSocket

log = structlog.get_logger("hearing")


class Chosen(NamedTuple):
    """What is to become of a pod's slots: `foreign` ones are emptied, then `added` are stored by slot."""

    foreign: list[int]
    added: dict[int, Listener]


class Hearing:
    """Looks for listeners by the kernel's iterator or, where the kernel does not take it, in the pod's processes.

    Safe to use from many threads.
    """

    def __init__(self, enrolments: Enrolments, pins: Pins, proc: Path = Path("/proc")) -> None:
        self._enrolments = enrolments
        self._proc = proc
        self._iterator = _iterator_of(pins)
        self._lock = threading.Lock()  # held from a look at a pod's slots to the writing of them

    @property
    def needs_processes(self) -> bool:
        """Whether hear() finds listeners only among the sockets of the processes that it is given."""
        return self._iterator is None

    def hear(
        self, proxy: Proxy | Ztunnel, netns: int, pids: Iterable[int] = (), ends_early_outbound: bool = False
    ) -> int:
        """Register listeners of a pod's proxy. Returns how many were registered.

        `netns` is a descriptor of the pod's network namespace, `pids` are processes that may have its proxy's sockets.
        If `ends_early_outbound`, a proxy that listens for outbound connections has started. Raises SandboxInvalid,
        KernelRefused.
        """
        with self._lock:
            stored = self._enrolments.listeners(proxy.cookie)
            present = on_proxys_ports(netns)
            if not _is_any_missing(present, stored, ends_early_outbound):
                return 0
            if self._iterator is not None:
                found = by_iterator(self._iterator, proxy, netns)
                count = self._store(self._iterator, proxy.cookie, netns, choose(found, stored))
            else:
                with by_processes(proxy, present, pids, self._proc) as found:
                    added = choose(found, stored).added
                    count = sum(self._add(proxy.cookie, slot, each) for slot, each in added.items())
        # as in sockops.c: istio-validation listens on this port too, but on 127.0.0.1
        if ends_early_outbound and any(each.port == OUTBOUND_PORT and each.anywhere for each in found):
            self._enrolments.has_started(proxy.cookie)
        return count

    def distrust(self, error: KernelRefused) -> None:
        """Look in processes from now on, because the kernel has taken the iterator and yet refuses its work."""
        with self._lock:
            if self._iterator is not None:
                log.warning("iterator.refused", error=str(error), consequence="listeners are looked for in processes")
                self._iterator.close()
                self._iterator = None

    def close(self) -> None:
        """Let go of the iterator."""
        with self._lock:
            if self._iterator is not None:
                self._iterator.close()
                self._iterator = None

    def _add(self, cookie: int, slot: int, listener: Listener) -> bool:
        assert listener.copy is not None
        return self._enrolments.add_listener(cookie, slot, listener.copy)

    def _store(self, iterator: SocketIterator, cookie: int, netns: int, chosen: Chosen) -> int:
        """Store listeners in slots. Raises KernelRefused if the kernel does not, though the sockets still listen."""
        for slot in chosen.foreign:
            self._enrolments.drop_listener(cookie, slot)
        if not chosen.added:
            return 0
        wanted = {slot: each.cookie for slot, each in chosen.added.items()}
        visit(netns, lambda _: iterator.store(cookie, wanted))
        stored = self._enrolments.listeners(cookie)
        if wanted.keys().isdisjoint(stored):
            listen = {each.socket for each in visit(netns, lambda _: iterator.found())}
            if listen.issuperset(wanted.values()):
                raise KernelRefused("the iterator stores no listener, although the sockets listen")
        return sum(stored.get(slot) == socket for slot, socket in wanted.items())


def choose(found: Collection[Listener], stored: Mapping[int, int]) -> Chosen:
    """Choose listeners for the slots of a pod. `stored` has the cookies of the sockets that are there, by slot.

    What is stored stays where it is, unless a listener of one family is in a slot of the other.
    """
    chosen = Chosen([], {})
    inbound = {each.cookie: each for each in found if each.port == INBOUND_PORT}
    for family in FAMILIES:
        slots = slots_of(family)
        kept = {stored[slot] for slot in slots if slot in stored}
        left = sorted(cookie for cookie, each in inbound.items() if each.family == family and cookie not in kept)
        for slot in slots:
            is_foreign = slot in stored and stored[slot] in inbound and inbound[stored[slot]].family != family
            if is_foreign:
                chosen.foreign.append(slot)
            if left and (is_foreign or slot not in stored):
                # from both ends, as sockets of a proxy and of its successor may be among them
                chosen.added[slot] = inbound[left.pop(-1 if slot == slots[-1] else 0)]
    return chosen


def _is_any_missing(
    present: Collection[TcpSocket | SocketRow], stored: Mapping[int, int], ends_early_outbound: bool
) -> bool:
    """Whether a look at the openers of these sockets could change anything."""
    if ends_early_outbound and any(each.local_port == OUTBOUND_PORT for each in present):
        return True
    for family in FAMILIES:
        inbound = [each for each in present if each.family == family and each.local_port == INBOUND_PORT]
        slots = slots_of(family)
        # net/tcp does not tell a socket's cookie; there, any stored socket counts
        cookies = {
            each.cookie if isinstance(each, TcpSocket) else stored.get(slot) for each in inbound for slot in slots
        }
        if sum(slot in stored and stored[slot] in cookies for slot in slots) < min(len(inbound), len(slots)):
            return True
    return False


def _iterator_of(pins: Pins) -> SocketIterator | None:
    try:
        return SocketIterator(pins)
    except (KernelRefused, NotAttached) as error:
        log.info("iterator.missing", error=str(error), consequence="listeners are looked for in processes")
        return None
