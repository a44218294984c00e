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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from installer.host import files, plugin
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


class Host:
    """The two directories of a host and the image's shim."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.chain = Chain(
            mounted_cni_bin_dir=root / "bin", mounted_cni_net_dir=root / "net", shim=root / "image" / "sidestep-cni"
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


@pytest.mark.parametrize("kind", BEFORE)
@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_killed_anywhere_nothing_is_half_written_and_the_next_start_recovers(
    tmp_path: Path, kind: str, verb: str
) -> None:
    name, document = BEFORE[kind]
    host = Host(tmp_path)
    conf = host.chain.mounted_cni_net_dir / name
    conf.write_text(json.dumps(document, indent=2) + "\n")
    outside = host.visible()
    host.install()
    inside = host.visible()
    saved = tmp_path / "saved"
    host.uninstall()
    assert host.visible() == outside
    if verb == "uninstall":
        host.install()
    for directory in ("bin", "net"):
        shutil.copytree(host.root / directory, saved / directory)

    def restore() -> None:
        for directory in ("bin", "net"):
            shutil.rmtree(host.root / directory)
            shutil.copytree(saved / directory, host.root / directory)

    whole = {(path, content) for state in (outside, inside) for path, content in state.items()}
    steps = 0
    for _ in killed_at_every_step(getattr(host, verb), restore):
        steps += 1
        seen = host.visible()
        assert set(seen.items()) <= whole
        assert any(path.startswith("net/") for path in seen), "the network was gone"
        if "net/10-a.conflist" in seen and b"sidestep-cni" in seen["net/10-a.conflist"] and verb == "install":
            assert "bin/sidestep-cni" in seen, "the chain names a plugin that is not there"
        getattr(host, verb)()
        assert host.visible() == (inside if verb == "install" else outside)
        assert not any(files.is_temporary(each) for each in host.everything())
    assert steps >= 10


def test_content_is_on_disk_before_its_name_and_the_name_before_going_on(tmp_path: Path) -> None:
    host = Host(tmp_path)
    (host.chain.mounted_cni_net_dir / "10-a.conf").write_text(json.dumps(BEFORE["single"][1]))
    trace = tmp_path / "trace"

    def note(count: int, name: str, args: tuple[Any, ...]) -> None:
        if name in ("write", "fchmod", "fsync"):
            what = Path(f"/proc/self/fd/{args[0]}").readlink().name
        elif name in ("rename", "unlink"):
            what = " ".join(args[:2])
        else:
            return
        with trace.open("a") as file:
            file.write(re.sub(r"\.sidestep-tmp-\w+", "tmp", f"{name} {what}\n"))

    assert in_child(host.install, note) == 0
    written = ["fchmod tmp", "fsync tmp"]
    assert trace.read_text().splitlines() == [
        *["write tmp"] * 3,
        *[*written, "rename tmp sidestep-cni", "fsync bin"],
        "write tmp",
        *[*written, "rename tmp 10-a.conflist", "fsync net"],
        *["unlink 10-a.conf", "fsync net"],
    ]
