"""The plugin on the host and in the chain: put there, kept there against others, and taken away without a trace."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from installer.host.confdir import ConfDirectory
from installer.host.files import FileRefused
from installer.host.install import Installer
from installer.settings import Chain, Node
from tests.lab.waiting import wait_until

BRIDGE: dict[str, Any] = {"type": "bridge", "ipam": {}}
LIST = {"cniVersion": "1.0.0", "name": "net", "plugins": [BRIDGE]}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Host:
    """The two directories of a host, and an installer that works on them."""

    def __init__(self, root: Path) -> None:
        self.bin, self.net, self.shim = root / "bin", root / "net.d", root / "image" / "sidestep-cni"
        for directory in (self.bin, self.net, self.shim.parent):
            directory.mkdir()
        self.shim.write_bytes(b"\x7fELF one")
        self.results: list[str] = []
        self.ready: tuple[bool, str] = (False, "")
        self._running = ExitStack()

    def chain(self, **options: Any) -> Chain:
        return Chain(
            install=True, mounted_cni_bin_dir=self.bin, mounted_cni_net_dir=self.net, shim=self.shim, **options
        )

    def start(self, **options: Any) -> None:
        installer = Installer(self.chain(**options), Node(), self.results.append, self._on_ready)
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
        try:
            return [plugin["type"] for plugin in json.loads((self.net / name).read_text())["plugins"]]
        except FileNotFoundError:
            return []

    def is_installed(self, name: str = "10-a.conflist") -> bool:
        shim = self.bin / "sidestep-cni"
        return (
            shim.exists() and shim.read_bytes() == self.shim.read_bytes() and self.types(name)[-1:] == ["sidestep-cni"]
        )

    def wait_until_installed(self, name: str = "10-a.conflist") -> None:
        wait_until(lambda: self.is_installed(name) and self.ready[0], "the plugin to be installed", 3)

    def _on_ready(self, ok: bool, why: str) -> None:
        self.ready = (ok, why)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.stop()


def test_shim_and_entry_are_put_in_place(host: Host) -> None:
    conf = host.write("10-a.conflist", LIST, mode=0o640)
    os.chown(conf, 4711, 4712)
    host.start()
    host.wait_until_installed()
    assert (host.bin / "sidestep-cni").stat().st_mode & 0o7777 == 0o755
    status = conf.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o640, 4711, 4712)
    assert names(host.net) == ["10-a.conflist"]
    assert names(host.bin) == ["sidestep-cni"]
    assert host.results == ["SUCCESS"]


def test_it_waits_for_the_primary_plugins_configuration(host: Host) -> None:
    host.start()
    wait_until(lambda: "waiting for the primary plugin" in host.ready[1], "the installer to wait", 3)
    assert (host.bin / "sidestep-cni").exists()
    host.write("10-a.conf", {"name": "mynet", **BRIDGE})
    host.wait_until_installed()
    assert names(host.net) == ["10-a.conflist"]
    assert json.loads((host.net / "10-a.conflist").read_text())["name"] == "mynet"


def test_stopping_leaves_everything(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    host.start()
    host.wait_until_installed()
    host.stop()
    assert host.is_installed()


def overwrite(host: Host) -> None:
    host.write("10-a.conflist", {**LIST, "plugins": [BRIDGE, {"type": "tuning"}]})


def truncate(host: Host) -> None:
    (host.net / "10-a.conflist").write_text("")
    host.write("10-a.conflist", LIST)


def change_options(host: Host) -> None:
    document = json.loads((host.net / "10-a.conflist").read_text())
    document["plugins"][-1]["cni_agent_run_dir"] = "/elsewhere"
    host.write("10-a.conflist", document)


def delete_shim(host: Host) -> None:
    (host.bin / "sidestep-cni").unlink()


def break_shim(host: Host) -> None:
    (host.bin / "sidestep-cni").write_bytes(b"")


def take_execution_away(host: Host) -> None:
    (host.bin / "sidestep-cni").chmod(0o600)


def replace_directory(host: Host) -> None:
    shutil.rmtree(host.net)
    host.net.mkdir()
    host.write("10-a.conflist", LIST)


def upgrade(host: Host) -> None:
    host.shim.write_bytes(b"\x7fELF two, longer")
    (host.bin / "wake").write_text("")


@pytest.mark.parametrize(
    "tamper",
    [overwrite, truncate, change_options, delete_shim, break_shim, take_execution_away, replace_directory, upgrade],
)
def test_what_somebody_else_does_is_repaired(host: Host, tamper: Callable[[Host], None]) -> None:
    host.write("10-a.conflist", LIST)
    host.start()
    host.wait_until_installed()
    before = (host.net / "10-a.conflist").read_text()
    tamper(host)
    wait_until(lambda: len(host.results) > 1, "the repair", 3)
    host.wait_until_installed()
    assert (host.bin / "sidestep-cni").stat().st_mode & 0o7777 == 0o755
    assert ("/elsewhere" in (host.net / "10-a.conflist").read_text()) == ("/elsewhere" in before)


def test_a_name_that_now_comes_first_gets_the_entry(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    host.start()
    host.wait_until_installed()
    host.write("05-cilium.conflist", {**LIST, "plugins": [{"type": "cilium-cni"}]})
    host.wait_until_installed("05-cilium.conflist")


def test_a_chosen_file_is_edited_even_if_others_come_first(host: Host) -> None:
    host.write("05-other.conflist", LIST)
    host.write("10-a.conf", {"name": "mynet", **BRIDGE})
    host.start(cni_conf_name="10-a.conflist")
    host.wait_until_installed()
    assert host.types("05-other.conflist") == ["bridge"]


def test_a_standalone_network_has_a_file_of_its_own(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    host.start(chained_cni_plugin=False, cni_conf_group_read=True)
    own = host.net / "YYY-sidestep-cni.conf"
    wait_until(lambda: own.exists() and host.ready[0], "the file", 3)
    assert own.stat().st_mode & 0o7777 == 0o640
    assert json.loads(own.read_text())["type"] == "sidestep-cni"
    assert host.types("10-a.conflist") == ["bridge"]


def test_an_installer_that_keeps_rewriting_is_named_and_not_raced(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    with capture_logs() as logs:
        host.start()
        for _ in range(7):
            host.wait_until_installed()
            host.write("10-a.conflist", {**LIST, "plugins": [{"type": "cilium-cni"}]})
        wait_until(lambda: any(line["event"] == "chain.contested" for line in logs), "the fight to be noticed", 5)
        host.stop()
    contested = [line for line in logs if line["event"] == "chain.contested"]
    assert len(contested) == 1
    assert "cilium-cni" in contested[0]["plugins"]
    assert len(host.results) <= 9


def test_a_link_in_the_way_is_replaced_not_followed(host: Host, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (host.bin / "sidestep-cni").symlink_to(victim)
    (host.net / "05-link.conflist").symlink_to(victim)
    host.write("10-a.conflist", LIST)
    host.start()
    host.wait_until_installed()
    assert victim.read_text() == "precious"
    assert not (host.bin / "sidestep-cni").is_symlink()


def test_what_cannot_be_done_is_said_with_the_setting(host: Host) -> None:
    (host.bin / "sidestep-cni").mkdir()
    host.write("10-a.conflist", LIST)
    host.start()
    wait_until(lambda: host.results == ["COPY_BINARIES_FAILURE"], "the failure", 3)
    assert host.ready[0] is False
    assert "sidestep-cni is a directory; remove it" in host.ready[1]
    assert "MOUNTED_CNI_BIN_DIR" in host.ready[1]
    assert host.types("10-a.conflist") == ["bridge"]


def test_another_files_name_is_never_taken(host: Host) -> None:
    host.write("10-a.conf", {"name": "one", **BRIDGE})
    other = host.write("10-a.conflist", {**LIST, "name": "two"})
    with pytest.raises(FileRefused, match=r"10-a.conflist is in the way of 10-a.conf; remove one of the two"):
        ConfDirectory(host.chain(), {"type": "sidestep-cni"}).enter()
    assert json.loads(other.read_text())["name"] == "two"
