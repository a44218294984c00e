"""Takes pods over from another layout: a version of sidestep whose maps have other shapes.

A version that is newer or older is known by names alone: its links of programs are `links/<hook>`, its pods' steering
links `netns/<cookie>`, its maps `maps/<name>`, and `shapes/<name>` says what each map holds. This version attaches
beside it. Then both run for a while, and no connection is missed or captured twice:

* The other's programs were attached first, so they run first. A connection that they have rewritten leads to the proxy
  on loopback, and this version lets such connections pass.
* This version's programs do nothing for a pod until its entry is in this version's map `pods`.
* A steering link that moves is updated in place. Where each version has a link of its own, the socket that one of them
  has chosen stands.

Once this version has every running pod, retire() takes the other's deciding programs off, waits for the hand-overs that
are under way, then takes off the rest. Maps of sockets whose shape is the same are used by both versions. If they
differ, only the other's programs know what the connections were that they have captured. So those programs that answer
the application's and the proxy's questions stay until the pods of that time have ended.
"""

import ctypes
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from bpf import syscalls
from bpf.errors import KernelRefused
from bpf.hooks import DECIDING
from bpf.kernel import possible_cpus
from bpf.layout import PodFlags
from bpf.layouts import other_layouts, steered
from bpf.pins import Pins
from bpf.places import link_directories_of
from bpf.shapes import Shape, shapes
from bpf.steering import load_instance, opened
from bpf.syscalls import Descriptor

# seconds that may pass between connect() and the moment when a busy proxy asks for the original destination
ON_THE_WAY = 1.0
# programs that note what later steps need: without the deciding ones they have nothing to do
_NOTING = ("sock_create", "post_bind4", "post_bind6")
# programs that answer what a connection was, as long as it lives
_ANSWERING = ("getpeername4", "getpeername6", "getsockopt", "recvmsg4", "recvmsg6")
# maps that the programs fill. Both versions use one map of these if its shape is the same. handshakes come from sockets
# and go to sockets: a version that does not know a socket as captured deletes what the other has written
_SHARED = (("sockets", "handshakes"), ("resolvers",), ("dials",), ("listeners",))
# what is stored with sockets: who has it can answer for open connections
_STORED = ("sockets", "resolvers")
# maps of pods, all of which are copied or none: a pod's entry refers to what is in the others
_OF_PODS = ("pods", "addresses", "port_rules", "networks", "routes", "interfaces")
# other maps that can be copied, each group as a whole: what is counted in one is set against what is in another
_COPIED = (
    ("proxies",),
    ("ztunnels",),
    ("kubelet",),
    ("started",),
    ("traffic",),
    ("totals",),
    ("passages",),
    ("tallies", "uncaptured", "coverage", "forgotten"),
    ("flows", "flow_sums", "flows_forgotten"),
    ("shadow_counts", "shadow_sums", "findings"),
)
# of a Pod from the API server, or from a file that kubelet reads
_UID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<![0-9a-f]{8})[0-9a-f]{32}(?![0-9a-f])")
_PER_CPU = (5, 6)  # map types PERCPU_HASH, PERCPU_ARRAY (uapi/linux/bpf.h)


def attached_others(pins: Pins) -> list[Path]:
    """The other layouts whose programs still decide about connections, or that still steer pods."""
    return [path for path in other_layouts(pins) if _decides(path) or steered(path)]


def note_shapes(layout: Path) -> None:
    """Write down the shapes of this version's maps in its layout, for other versions to read."""
    (layout / "shapes").mkdir(mode=0o700, exist_ok=True)
    for name, shape in shapes().items():
        with suppress(FileExistsError):
            (layout / "shapes" / name).symlink_to(f"{shape.entry} {shape.whole}")


def share_maps(fresh: Path, other: Path) -> None:
    """Pin in a fresh layout the other layout's maps that both can use."""
    ours, theirs = shapes(), _shapes_of(other)
    for names in _SHARED:
        for name in names if all(name in ours and theirs.get(name) == ours[name] for name in names) else ():
            with suppress(KernelRefused), Descriptor(syscalls.open_pin(other / "maps" / name)) as shared:
                syscalls.pin(shared.fd, fresh / "maps" / name)


def copy_maps(fresh: Path, other: Path) -> None:
    """Copy into a fresh layout what the other layout says about its pods, as far as an entry is the same in both.

    From now on the other layout accelerates nothing: messages on its connections go by TCP.
    """
    ours, theirs = shapes(), _shapes_of(other)
    same = [name for name, shape in theirs.items() if name in ours and shape.entry == ours[name].entry]
    of_pods = _OF_PODS if set(_OF_PODS) <= set(same) else ()
    for names in (*(each for each in _COPIED if set(each) <= set(same)), reversed(of_pods)):
        with suppress(KernelRefused):  # there is less room, or a pin is gone: the agent enrols these pods
            for name in names:  # pods last, as at ADD
                _copy(other / "maps" / name, fresh / "maps" / name)
    _stop_accelerating(other)


def take_steering(pins: Pins, other: Path, cookie: int) -> None:
    """Move a pod's steering link from another layout here, with this version's program in it.

    The pod has to be in this version's maps, with its listeners. Raises KernelRefused, NotAttached.
    """
    path, target = other / "netns" / str(cookie), pins.netns / str(cookie)
    if target.exists():
        path.unlink()
        return
    with (
        opened(pins) as maps,
        Descriptor(load_instance(maps, cookie)) as program,
        Descriptor(syscalls.open_pin(path)) as link,
    ):
        syscalls.update_link(link.fd, program.fd, path)
    path.rename(target)


def shares_listeners(pins: Pins, other: Path) -> bool:
    """Whether both layouts steer to the same listeners."""
    return _is_shared(pins, other, "listeners")


def heard_by(other: Path) -> set[int]:
    """The pods of whose proxies another layout knows a listener, by netns cookie."""
    return {int.from_bytes(key[:8], "little") for key in _keys(other, "listeners")}


def entries_of_pods(other: Path) -> dict[int, bytes]:
    """Another layout's entries of pods, whatever their struct: netns cookie → the entry's bytes."""
    found = {}
    with suppress(KernelRefused), Descriptor(syscalls.open_pin(other / "maps" / "pods")) as table:
        info = syscalls.map_info(table.fd)
        if info.key_size == ctypes.sizeof(ctypes.c_uint64):
            for key in _keys_of(table.fd):
                value = (ctypes.c_char * info.value_size)()
                if syscalls.map_lookup(table.fd, key, value):
                    found[int.from_bytes(bytes(key), "little")] = value.raw
    return found


def uid_in(entry: bytes) -> str:
    """The pod's UID in an entry of any version; empty if there is none."""
    uid = _UID.search(entry)
    return uid[0].decode() if uid else ""


def flags_in(entry: bytes) -> PodFlags:
    """The pod's flags in an entry of any version, which begin it. An older version knows fewer of them."""
    return PodFlags(int.from_bytes(entry[:4], "little"))


def has_texts(entry: bytes, *texts: str) -> bool:
    """Whether an entry of any version has these texts, each as a whole field."""
    return all(b"\0" + text.encode() + b"\0" in entry for text in texts)


def name_in(entry: bytes) -> str:
    """The pod's name in an entry of any version, as NAMESPACE/NAME; empty if there is no UID.

    In every version an entry has the UID, then the name, then the namespace.
    """
    uid = _UID.search(entry)
    texts = [text for text in entry[uid.end() :].split(b"\0") if text] if uid else []
    return f"{texts[1].decode(errors='replace')}/{texts[0].decode(errors='replace')}" if len(texts) > 1 else ""


def kept_by_others(pins: Pins) -> dict[str, list[str]]:
    """The pods that other layouts still capture: name of a layout → names of its running pods, or their cookies."""
    kept = {}
    for other in attached_others(pins):
        entries, ours = entries_of_pods(other), steered(pins.root)
        running = steered(other).keys() - ours.keys()
        kept[other.name] = sorted(name_in(entries.get(each, b"")) or f"netns cookie {each}" for each in running)
    return kept


def retire(pins: Pins, other: Path) -> None:
    """Take another layout off, whose running pods are all in this one."""
    if "-" not in other.name:  # so that going back to its version finds no half of it
        other = other.rename(next(path for path in _free(other) if not path.exists()))
    if not all(_is_shared(pins, other, name) for name in _STORED):
        for cookie in steered(pins.root):
            (other / "open" / str(cookie)).mkdir(mode=0o700, parents=True, exist_ok=True)
    for directory in link_directories_of(other):
        for name in (*DECIDING, *_NOTING):
            (directory / name).unlink(missing_ok=True)
    shutil.rmtree(other / "netns", ignore_errors=True)
    time.sleep(ON_THE_WAY)
    clear_retired(pins)


def clear_retired(pins: Pins) -> None:
    """Remove what is left of retired layouts, less the programs that answer for connections of pods that still run."""
    retired = [other for other in other_layouts(pins) if not (_decides(other) or steered(other))]
    alive = steered(pins.root) if retired else {}
    for other in retired:
        for path in (other / "open").glob("*"):
            if int(path.name) not in alive:
                path.rmdir()
        is_asked = any((other / "open").glob("*"))
        for path in (path for directory in link_directories_of(other) for path in directory.glob("*")):
            if not is_asked or path.name not in _ANSWERING:
                path.unlink()
        for path in other.iterdir():
            if not is_asked or path.name not in ("links", "places", "open"):
                shutil.rmtree(path)
        if not is_asked:
            other.rmdir()


def _free(layout: Path) -> Iterator[Path]:
    """Names that a layout can have until the last of it is gone."""
    return (layout.with_name(f"{layout.name}-{number}") for number in count())


def _decides(layout: Path) -> bool:
    return any((directory / name).exists() for directory in link_directories_of(layout) for name in DECIDING)


def _shapes_of(layout: Path) -> dict[str, Shape]:
    """The shapes that a layout has written down; none if it is of a version that did not."""
    return {path.name: Shape(*str(path.readlink()).split()) for path in (layout / "shapes").glob("*")}


def _is_shared(pins: Pins, other: Path, name: str) -> bool:
    try:
        with (
            Descriptor(syscalls.open_pin(pins.maps / name)) as ours,
            Descriptor(syscalls.open_pin(other / "maps" / name)) as theirs,
        ):
            return bool(syscalls.map_info(ours.fd).id == syscalls.map_info(theirs.fd).id)
    except KernelRefused:
        return False


def _stop_accelerating(other: Path) -> None:
    """Set the other layout's node settings to zero, which is the level off in every version."""
    with suppress(KernelRefused), Descriptor(syscalls.open_pin(other / "maps" / "node")) as node:
        size = syscalls.map_info(node.fd).value_size
        syscalls.map_update(node.fd, _raw(4)(), (ctypes.c_char * size)())


def _copy(origin: Path, copy: Path) -> None:
    with Descriptor(syscalls.open_pin(origin)) as source, Descriptor(syscalls.open_pin(copy)) as target:
        info = syscalls.map_info(source.fd)
        size = -(-info.value_size // 8) * 8 * possible_cpus() if info.type in _PER_CPU else info.value_size
        for key in _keys_of(source.fd):
            value = (ctypes.c_char * size)()
            if syscalls.map_lookup(source.fd, key, value) and (number := syscalls.map_update(target.fd, key, value)):
                raise syscalls.refused("bpf_map_update_elem", copy, number)


def _keys(layout: Path, name: str) -> Iterator[bytes]:
    with suppress(KernelRefused), Descriptor(syscalls.open_pin(layout / "maps" / name)) as table:
        yield from (bytes(key) for key in _keys_of(table.fd))


def _keys_of(table: int) -> Iterator[ctypes.Structure]:
    """Every key of a map, in no more steps than it has room for: the kernel starts again if a key goes meanwhile."""
    info = syscalls.map_info(table)
    kind, key = _raw(info.key_size), None
    for _ in range(info.max_entries):
        following = kind()
        if not syscalls.map_next_key(table, key, following):
            return
        yield following
        key = following


def _raw(size: int) -> type[ctypes.Structure]:
    return type("Raw", (ctypes.Structure,), {"_fields_": [("bytes", ctypes.c_uint8 * size)]})
