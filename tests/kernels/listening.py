"""`python -m tests.kernels.listening CGROUP`: whether the kernel's iterator finds and stores listeners, as JSON."""

import json
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from bpf.attachment import attach_programs, detach_programs
from bpf.errors import KernelRefused
from bpf.iterator import SocketIterator
from bpf.kernel import cgroup2_root, own_cgroup
from bpf.layout import INBOUND_PORT, slots_of
from bpf.pins import Pins
from bpf.tables import Tables

_ADDRESSES = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_COOKIE = 1  # nobody's


def main(cgroup: Path) -> dict[str, str]:
    """Listen in both families, and have one listener of each stored; what went wrong by step, "" for nothing."""
    pins = Pins(Path("/sys/fs/bpf"))
    attach_programs(pins, cgroup)
    try:
        with ExitStack() as opened, Tables(pins) as tables:
            for family, address in _ADDRESSES.items():
                listener = opened.enter_context(socket.socket(family))
                listener.bind((address, INBOUND_PORT))
                listener.listen()
            try:
                iterator = SocketIterator(pins)
            except KernelRefused as error:
                return {"iterator": str(error)}
            opened.callback(iterator.close)
            found = iterator.found()
            iterator.store(_COOKIE, {slots_of(each.family)[0]: each.socket for each in found})
            stored = {value.quad for key, value in tables.listeners.every() if key.cookie == _COOKIE}
            openers = {(each.opener.uid, each.opener.gid, each.opener.cgroup) for each in found}
            return {
                "found": "" if len(found) == len(_ADDRESSES) else f"{len(found)} of {len(_ADDRESSES)}",
                "openers": "" if openers == {(0, 0, _own_cgroup())} else f"{openers}",
                "stored": "" if stored == {each.socket for each in found} else f"{len(stored)}",
            }
    finally:
        detach_programs(pins)


def _own_cgroup() -> int:
    root = cgroup2_root()
    directory = own_cgroup(root)
    return (directory or root).stat().st_ino


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
