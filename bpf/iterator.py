"""Finds the listening sockets of a network namespace by a program that the kernel runs for each TCP socket in it.

No process has to help: no pidfd, no ptrace, no id of a process. iterator.c is the program. If the kernel does not take
it, there is no pin of it, and the agent looks for listeners among the descriptors of processes.
"""

import ctypes
import os
import threading
from collections.abc import Iterable, Mapping

from bpf import syscalls
from bpf.hooks import ITERATOR_HOOK
from bpf.layout import ChoiceEntry, FoundListener, Word
from bpf.pins import Pins
from bpf.syscalls import Descriptor

_BUFFER = 1 << 15  # bytes that are read at once; the kernel's own buffer has as many (kernel/bpf/bpf_iter.c)


class SocketIterator:
    """Runs in the network namespace of the calling thread. Safe to use from many threads.

    Holds the program, so removing its pin changes nothing. Raises KernelRefused if this kernel has not taken it, and
    NotAttached.
    """

    def __init__(self, pins: Pins) -> None:
        with Descriptor(syscalls.open_pin(pins.programs / ITERATOR_HOOK.name)) as program:
            self._link = syscalls.create_link(program.fd, 0, ITERATOR_HOOK.attach_type, "the iterator over sockets")
        try:
            self._choices = pins.open_map("choices")
        except BaseException:
            os.close(self._link)
            raise
        self._lock = threading.Lock()  # held while a choice is in the map, as there is room for one

    def found(self) -> list[FoundListener]:
        """The listeners on the proxy's ports, of all processes. Raises KernelRefused."""
        return self._run(ChoiceEntry())

    def store(self, cookie: int, sockets: Mapping[int, int]) -> None:
        """Put listeners of the pod `cookie` into free slots of the map `listeners`: slot → the socket's cookie.

        What the kernel does not store is missing in the map afterwards. Raises KernelRefused.
        """
        choice = ChoiceEntry(cookie)
        for slot, socket in sockets.items():
            choice.socket[slot] = socket
        self._run(choice)

    def close(self) -> None:
        """Let go of the program."""
        for descriptor in (self._link, self._choices):
            os.close(descriptor)

    def _run(self, choice: ChoiceEntry) -> list[FoundListener]:
        with self._lock:
            self._choose(choice)
            try:
                raw = b"".join(_read(self._link))
            finally:
                self._choose(ChoiceEntry())
        size = ctypes.sizeof(FoundListener)
        return [FoundListener.from_buffer_copy(raw, at) for at in range(0, len(raw), size)]

    def _choose(self, choice: ChoiceEntry) -> None:
        if number := syscalls.map_update(self._choices, Word(0), choice):
            raise syscalls.refused("bpf_map_update_elem", "choices", number)


def _read(link: int) -> Iterable[bytes]:
    with Descriptor(syscalls.create_iterator(link)) as iterator:
        try:
            while piece := os.read(iterator.fd, _BUFFER):
                yield piece
        except OSError as error:
            raise syscalls.refused("read", "the iterator over sockets", error.errno or 0) from error
