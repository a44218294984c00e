"""Inbound steering: a link and an instance of the lookup program per pod's namespace, pinned by netns cookie."""

import errno
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from bpf import syscalls
from bpf.errors import KernelRefused
from bpf.hooks import NETNS_HOOK
from bpf.pins import Pins
from bpf.steering import name_of_instances
from bpf.syscalls import Descriptor


def link_pod(pins: Pins, cookie: int, netns_fd: int, program_fd: int) -> bool:
    """Attach the pod's instance to its namespace and pin the link by cookie; False if the pin exists already.

    Raises KernelRefused.
    """
    path = pins.netns / str(cookie)
    if path.exists():
        return False
    made = syscalls.create_link(program_fd, netns_fd, NETNS_HOOK.attach_type, f"netns {cookie}")
    with Descriptor(made) as link:
        syscalls.pin(link.fd, path)
    return True


def unlink_pod(pins: Pins, cookie: int) -> bool:
    """Detach inbound steering from a pod's namespace; False if there was no link."""
    try:
        (pins.netns / str(cookie)).unlink()
    except FileNotFoundError:
        return False
    return True


def linked_pods(pins: Pins) -> Iterator[tuple[int, int]]:
    """Every pinned pod link as (cookie, inode of the namespace).

    The inode is 0 if the namespace is gone or the link was detached.
    """
    return linked_in(sorted(pins.netns.iterdir()))


def linked_in(paths: Iterable[Path]) -> Iterator[tuple[int, int]]:
    """The same of the pods' links that are pinned at these paths, of whatever version."""
    for path in paths:
        with suppress(KernelRefused), Descriptor(syscalls.open_pin(path)) as link:
            yield int(path.name), syscalls.link_info(link.fd).netns_inode


def pod_link_alive(pins: Pins, cookie: int) -> bool:
    """Whether the pod's namespace still exists and its link is still attached."""
    try:
        with Descriptor(syscalls.open_pin(pins.netns / str(cookie))) as link:
            return bool(syscalls.link_info(link.fd).netns_inode)
    except KernelRefused:
        return False


def is_steered(netns_fd: int, our_maps: Collection[int]) -> bool:
    """Whether a namespace has an instance of the lookup program that works with one of these maps, given by id.

    The namespace itself is asked, so the answer does not depend on pins. Raises KernelRefused.
    """
    attached = syscalls.attached_to(netns_fd, NETNS_HOOK.attach_type)
    return any(_works_with(number, our_maps) for number in attached.programs)


def steered_pods(pins: Pins, our_maps: Collection[int]) -> set[int]:
    """The cookies whose pinned link is attached, with a program that works with one of these maps."""
    paths = pins.netns.iterdir() if pins.netns.is_dir() else ()
    return {int(path.name) for path in paths if is_pod_steered(pins, int(path.name), our_maps)}


def is_pod_steered(pins: Pins, cookie: int, our_maps: Collection[int]) -> bool:
    """The same for one pod."""
    with suppress(KernelRefused), Descriptor(syscalls.open_pin(pins.netns / str(cookie))) as link:
        info = syscalls.link_info(link.fd)
        return bool(info.netns_inode) and _works_with(info.prog_id, our_maps)
    return False


def _works_with(program_id: int, maps: Collection[int]) -> bool:
    """Whether a program uses one of these maps. A program that has been replaced meanwhile does not.

    Without CAP_SYS_ADMIN the kernel shows no program. Then an attached link has to do, which only root can have pinned.
    """
    try:
        return syscalls.uses_map(program_id, maps)
    except KernelRefused as error:
        return error.errno == errno.EPERM


def instances(pins: Pins) -> Iterator[tuple[int, bool]]:
    """The program of every link whose namespace is there: its id, and whether it is an instance of the code kept now.

    Raises NotAttached.
    """
    current = name_of_instances(pins)
    for path in sorted(pins.netns.iterdir()):
        with suppress(KernelRefused), Descriptor(syscalls.open_pin(path)) as link:
            info = syscalls.link_info(link.fd)
            if info.netns_inode:
                with Descriptor(syscalls.open_program_id(info.prog_id)) as program:
                    yield info.prog_id, syscalls.program_info(program.fd).name.decode() == current


class RetainedLinks:
    """Descriptors of the links of enrolled pods: an open link lives without its pin. Safe to use from many threads."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}  # cookie → descriptor

    def retain(self, cookie: int) -> None:
        """Keep the link open that is pinned for a pod, if there is one, in the place of the link that was."""
        with self._lock, suppress(KernelRefused):
            opened = syscalls.open_pin(self._pins.netns / str(cookie))
            self._let_go(cookie)
            self._open[cookie] = opened

    def unlink(self, cookie: int) -> bool:
        """Let go of a pod's link and detach it; False if none was pinned."""
        with self._lock:
            self._let_go(cookie)
            return unlink_pod(self._pins, cookie)

    def restore(self) -> list[int]:
        """Pin each retained link again whose pin is gone; returns the cookies. Detached links are left out."""
        restored = []
        with self._lock:
            for cookie, opened in self._open.items():
                path = self._pins.netns / str(cookie)
                if not path.exists() and syscalls.link_info(opened).netns_inode:
                    syscalls.pin(opened, path)
                    restored.append(cookie)
        return restored

    def close(self) -> None:
        """Close every descriptor."""
        with self._lock:
            for cookie in list(self._open):
                self._let_go(cookie)

    def _let_go(self, cookie: int) -> None:
        if (before := self._open.pop(cookie, None)) is not None:
            os.close(before)
