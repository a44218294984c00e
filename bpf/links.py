"""Inbound steering: a link and an instance of the lookup program per pod's namespace, pinned by netns cookie."""

from collections.abc import Iterator
from contextlib import suppress

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
    for path in sorted(pins.netns.iterdir()):
        with suppress(KernelRefused), Descriptor(syscalls.open_pin(path)) as link:
            yield int(path.name), syscalls.link_info(link.fd).netns_inode


def pod_link_alive(pins: Pins, cookie: int) -> bool:
    """Whether the pod's namespace still exists and its link is still attached."""
    try:
        with Descriptor(syscalls.open_pin(pins.netns / str(cookie))) as link:
            return bool(syscalls.link_info(link.fd).netns_inode)
    except KernelRefused:
        return False


def is_steered(netns_fd: int, inbound_id: int) -> bool:
    """Whether a namespace has a pod's instance that calls the program in the map `inbound` with this id.

    The namespace itself is asked, so the answer does not depend on pins. Raises KernelRefused.
    """
    return any(_reads(number, inbound_id) for number in syscalls.attached_to(netns_fd, NETNS_HOOK.attach_type).programs)


def steered_pods(pins: Pins, inbound_id: int) -> set[int]:
    """The cookies whose pinned link is attached, with an instance that calls the program in the map with this id."""
    paths = pins.netns.iterdir() if pins.netns.is_dir() else ()
    return {int(path.name) for path in paths if is_pod_steered(pins, int(path.name), inbound_id)}


def is_pod_steered(pins: Pins, cookie: int, inbound_id: int) -> bool:
    """The same for one pod."""
    with suppress(KernelRefused), Descriptor(syscalls.open_pin(pins.netns / str(cookie))) as link:
        info = syscalls.link_info(link.fd)
        return bool(info.netns_inode) and _reads(info.prog_id, inbound_id)
    return False


def _reads(program_id: int, map_id: int) -> bool:
    """Whether a program uses a map. A program that has been replaced meanwhile does not."""
    with suppress(KernelRefused), Descriptor(syscalls.open_program_id(program_id)) as program:
        return map_id in syscalls.program_maps(program.fd)
    return False


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
