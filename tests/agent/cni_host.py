"""The host's side of an installation in directories of a test's own, and an installer that works on them."""

import errno
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from inotify_simple import INotify

from installer.host import watching
from installer.host.files import is_temporary
from installer.host.install import Installer
from installer.settings import Chain, Node
from tests.lab.waiting import wait_until

BRIDGE: dict[str, Any] = {"type": "bridge", "ipam": {}}
LIST = {"cniVersion": "1.0.0", "name": "net", "plugins": [BRIDGE]}
OWN = "00-sidestep-cni.conflist"
SOON = 20.0  # seconds, on a machine that has much else to do


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Host:
    """The two directories of a host, and an installer that works on them."""

    def __init__(self, root: Path) -> None:
        self.bin, self.net, self.shim = root / "bin", root / "net.d", root / "image" / "sidestep-cni"
        for directory in (self.bin, self.net, self.shim.parent):
            directory.mkdir()
        self.shim.write_bytes(b"\x7fELF one")
        self.proc = Path("/proc")
        self.may_stand_by = False
        self.results: list[str] = []
        self.ready: tuple[bool, str] = (False, "")
        self._running = ExitStack()

    def chain(self, **options: Any) -> Chain:
        return Chain(
            install=True, mounted_cni_bin_dir=self.bin, mounted_cni_net_dir=self.net, shim=self.shim, **options
        )

    def start(self, **options: Any) -> None:
        node = Node(proc=self.proc)
        installer = Installer(self.chain(**options), node, self.results.append, self._on_ready, self.may_stand_by)
        self._running.enter_context(installer.running())

    def stop(self) -> None:
        self._running.close()

    def write(self, name: str, document: Any, mode: int = 0o644) -> Path:
        path = self.net / name
        fresh = path.with_name(f"{name}.tmp")
        fresh.write_text(json.dumps(document))
        fresh.chmod(mode)
        fresh.rename(path)
        return path

    def types(self, name: str) -> list[str]:
        """Of the plugins in a list; none for what is not a list, as a single configuration is until the agent comes."""
        try:
            return [plugin["type"] for plugin in json.loads((self.net / name).read_text()).get("plugins", [])]
        except FileNotFoundError:
            return []

    def content(self) -> dict[str, bytes]:
        """Of all files that a runtime may look at."""
        found = {}
        for path in (*self.bin.iterdir(), *self.net.iterdir()):
            if not is_temporary(path.name):
                with suppress(FileNotFoundError):
                    found[path.name] = path.read_bytes()
        return found

    def is_installed(self, name: str = "10-a.conflist") -> bool:
        shim = self.bin / "sidestep-cni"
        return (
            shim.exists() and shim.read_bytes() == self.shim.read_bytes() and self.types(name)[-1:] == ["sidestep-cni"]
        )

    def wait_until_installed(self, name: str = "10-a.conflist") -> None:
        wait_until(lambda: self.is_installed(name) and self.ready[0], "the plugin to be installed", SOON)

    def _on_ready(self, ok: bool, why: str) -> None:
        self.ready = (ok, why)


def without_inotify(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> INotify:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(watching, "INotify", refuse)
