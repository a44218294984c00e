"""Killed at every step of install and uninstall: what is visible is whole, and the next start gets everything right.

The child runs the real code; a wrapper around the file-system calls of `os` kills it with SIGKILL before the n-th one.
A second wrapper keeps the order of calls, for what a power loss takes away is what was not yet synced.
"""

import json
import os
import queue
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from installer.host import chain, files, plugin
from installer.host.chain import entry_of
from installer.host.confdir import ConfDirectory
from installer.host.install import Installer
from installer.settings import Chain, Node

CALLS = ("open", "write", "fchown", "fchmod", "fsync", "rename", "unlink")
SHIM = bytes(range(256)) * 9000  # more than one write
BEFORE = {
    "list": ("10-a.conflist", {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}),
    "old list": ("10-a.conflist", {"cniVersion": "0.3.0", "name": "net", "plugins": [{"type": "bridge"}]}),
    "single": ("10-a.conf", {"cniVersion": "0.4.0", "name": "net", "type": "bridge"}),
    "single, behind its list": ("10-a.json", {"cniVersion": "0.4.0", "name": "net", "type": "bridge"}),
}
# what there was, and whose list has our entry: the primary plugin's, or one of our own
CASES = [*((kind, "primary") for kind in BEFORE), ("list", "owned"), ("single", "owned")]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory of a tmpfs: some hundred installs wait for a disk each time they sync, and none loses its power."""
    with TemporaryDirectory(prefix="sidestep-", dir="/dev/shm") as directory:
        yield Path(directory)


class Host:
    """The two directories of a host and the image's shim."""

    def __init__(self, root: Path, mode: str = "primary") -> None:
        self.root = root
        self.chain = Chain(
            mounted_cni_bin_dir=root / "bin",
            mounted_cni_net_dir=root / "net",
            shim=root / "image" / "sidestep-cni",
            istio_owned_cni_config=mode == "owned",
        )
        for directory in (self.chain.mounted_cni_bin_dir, self.chain.mounted_cni_net_dir, self.chain.shim.parent):
            directory.mkdir(parents=True)
        self.chain.shim.write_bytes(SHIM)

    def install(self) -> None:
        """Start an installer, and stop it once it is ready."""
        told: queue.Queue[tuple[bool, str]] = queue.Queue()
        installer = Installer(self.chain, Node(), lambda _: None, lambda ok, why: told.put((ok, why)))
        with installer.running():
            assert told.get(timeout=10) == (True, "")

    def uninstall(self) -> None:
        """The part of uninstall that is about files."""
        for directory in (self.chain.mounted_cni_bin_dir, self.chain.mounted_cni_net_dir):
            files.clear_leftovers(directory)
        ConfDirectory(self.chain, entry_of(Node())).leave()
        plugin.take_away(self.chain.mounted_cni_bin_dir)

    def change_mode(self) -> None:
        """The setting is another from now on."""
        self.chain = replace(self.chain, istio_owned_cni_config=not self.chain.istio_owned_cni_config)

    def taken(self) -> list[str]:
        """Which plugins a runtime would call."""
        found = {path.name: path.read_bytes() for path in self.chain.mounted_cni_net_dir.iterdir()}
        conf, _ = chain.first_valid({name: each for name, each in found.items() if not files.is_temporary(name)})
        return conf.types if conf else []

    def visible(self) -> dict[str, bytes]:
        """What a runtime could read or execute."""
        found = {}
        for directory in ("bin", "net"):
            for path in (self.root / directory).iterdir():
                if not files.is_temporary(path.name):
                    found[f"{directory}/{path.name}"] = path.read_bytes()
        return found

    def everything(self) -> list[str]:
        return sorted(path.name for directory in ("bin", "net") for path in (self.root / directory).iterdir())


def in_child(work: Callable[[], None], before_call: Callable[[int, str, tuple[Any, ...]], None]) -> int:
    """Run in a forked child that tells of every call first; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal count
                before_call(count, name, args)
                count += 1
                return real(*args, **options)

            return call

        for name in CALLS:
            setattr(os, name, wrapped(name, getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def killed_at_every_step(work: Callable[[], None], prepare: Callable[[], None]) -> Iterator[int]:
    """Yields after each kill; ends with the first run that gets through."""
    for step in range(1000):
        prepare()

        def die(count: int, name: str, args: tuple[Any, ...], step: int = step) -> None:
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

        status = in_child(work, die)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return
        yield step
    pytest.fail("it never gets through")


def saved(host: Host) -> Callable[[], None]:
    """Keep the directories as they are; returns what brings that back."""
    copy = host.root / "saved"
    for directory in ("bin", "net"):
        shutil.copytree(host.root / directory, copy / directory)

    def restore() -> None:
        for directory in ("bin", "net"):
            shutil.rmtree(host.root / directory)
            shutil.copytree(copy / directory, host.root / directory)

    return restore


@pytest.mark.parametrize(("kind", "mode"), CASES)
@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_killed_anywhere_nothing_is_half_written_and_the_next_start_recovers(
    memory: Path, kind: str, verb: str, mode: str
) -> None:
    name, document = BEFORE[kind]
    host = Host(memory, mode)
    conf = host.chain.mounted_cni_net_dir / name
    conf.write_text(json.dumps(document, indent=2) + "\n")
    outside = host.visible()
    host.install()
    inside = host.visible()
    host.uninstall()
    assert host.visible() == outside
    if verb == "uninstall":
        host.install()
    restore = saved(host)

    whole = {(path, content) for state in (outside, inside) for path, content in state.items()}
    steps = 0
    for _ in killed_at_every_step(getattr(host, verb), restore):
        steps += 1
        seen = host.visible()
        assert set(seen.items()) <= whole
        assert any(path.startswith("net/") for path in seen), "the network was gone"
        if "sidestep-cni" in host.taken():
            assert "bin/sidestep-cni" in seen, "the chain names a plugin that is not there"
        getattr(host, verb)()
        assert host.visible() == (inside if verb == "install" else outside)
        assert not any(files.is_temporary(each) for each in host.everything())
    assert steps >= (10 if verb == "install" or mode == "primary" else 4)


@pytest.mark.parametrize("kind", ["list", "single"])
@pytest.mark.parametrize("mode", ["primary", "owned"])
def test_killed_anywhere_in_a_change_of_whose_list_it_is_the_plugin_is_called_throughout(
    memory: Path, kind: str, mode: str
) -> None:
    name, document = BEFORE[kind]
    host = Host(memory, mode)
    (host.chain.mounted_cni_net_dir / name).write_text(json.dumps(document, indent=2) + "\n")
    host.install()
    restore = saved(host)
    host.change_mode()
    host.install()
    after = host.visible()
    steps = 0
    for _ in killed_at_every_step(host.install, restore):
        steps += 1
        assert host.taken() == ["bridge", "sidestep-cni"]
        host.install()
        assert host.visible() == after
        assert not any(files.is_temporary(each) for each in host.everything())
    assert steps >= 10


def traced(work: Callable[[], None], trace: Path) -> list[str]:
    """What it did to files, in order; those that are not finished are called tmp."""

    def note(count: int, name: str, args: tuple[Any, ...]) -> None:
        if name in ("write", "fchmod", "fsync"):
            what = Path(f"/proc/self/fd/{args[0]}").readlink().name
        elif name in ("rename", "unlink"):
            what = " ".join(args[:2])
        else:
            return
        with trace.open("a") as file:
            file.write(re.sub(r"\.sidestep-tmp-\w+", "tmp", f"{name} {what}\n"))

    assert in_child(work, note) == 0
    return trace.read_text().splitlines()


def replaced(name: str, directory: str, writes: int = 1) -> list[str]:
    """The one order in which a power loss leaves the old file or the new one."""
    return [*["write tmp"] * writes, "fchmod tmp", "fsync tmp", f"rename tmp {name}", f"fsync {directory}"]


SHIM_IN_PLACE = replaced("sidestep-cni", "bin", writes=3)
ORDERS: Mapping[tuple[str, str, str], list[str]] = {
    ("install", "list", "primary"): [*SHIM_IN_PLACE, *replaced("10-a.conflist", "net")],
    ("install", "single", "primary"): [
        *SHIM_IN_PLACE,
        *replaced("10-a.conflist", "net"),
        *["unlink 10-a.conf", "fsync net"],
    ],
    ("install", "single", "owned"): [*SHIM_IN_PLACE, *replaced("00-sidestep-cni.conflist", "net")],
    # the chain must be on disk without us before the plugin goes
    ("uninstall", "list", "primary"): [
        *replaced("10-a.conflist", "net"),
        *["unlink sidestep-cni", "fsync bin"],
    ],
    ("uninstall", "single", "primary"): [
        *replaced("10-a.conf", "net"),
        *["unlink 10-a.conflist", "fsync net"],
        *["unlink sidestep-cni", "fsync bin"],
    ],
    ("uninstall", "single", "owned"): [
        *["unlink 00-sidestep-cni.conflist", "fsync net"],
        *["unlink sidestep-cni", "fsync bin"],
    ],
}


@pytest.mark.parametrize(("verb", "kind", "mode"), ORDERS)
def test_content_is_on_disk_before_its_name_and_the_name_before_going_on(
    memory: Path, verb: str, kind: str, mode: str
) -> None:
    name, document = BEFORE[kind]
    host = Host(memory, mode)
    (host.chain.mounted_cni_net_dir / name).write_text(json.dumps(document))
    if verb == "uninstall":
        host.install()
    assert traced(getattr(host, verb), memory / "trace") == ORDERS[verb, kind, mode]
