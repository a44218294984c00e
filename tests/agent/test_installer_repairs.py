"""What others do to the plugin and its place in the chain is put right at once, and a fight is not fought."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from installer.host.chain import STANDALONE_FILE
from installer.host.confdir import ConfDirectory
from tests.agent.cni_host import BRIDGE, LIST, SOON, Host, without_inotify
from tests.lab.waiting import wait_until


def overwrite(host: Host) -> None:
    host.write("10-a.conflist", {**LIST, "plugins": [BRIDGE, {"type": "tuning"}]})


def write_anew(host: Host) -> None:
    host.write("10-a.conflist", LIST)


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


@pytest.mark.claim("the agent puts it back within a second")
@pytest.mark.claim("The agent repairs the chain")
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
    wait_until(lambda: len(host.results) > 1, "the repair", SOON)
    host.wait_until_installed()
    assert (host.bin / "sidestep-cni").stat().st_mode & 0o7777 == 0o755
    assert ("/elsewhere" in (host.net / "10-a.conflist").read_text()) == ("/elsewhere" in before)


def test_a_network_of_our_own_comes_back(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    host.start(chained_cni_plugin=False)
    wait_until(lambda: host.ready[0], "the plugin to be installed", SOON)
    before = host.content()
    (host.net / STANDALONE_FILE).unlink()
    wait_until(lambda: host.content() == before, "the repair", SOON)


def test_a_fight_is_told_and_its_repairs_go_on_with_pauses(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    pauses = []
    with capture_logs() as logs:
        host.start()
        host.wait_until_installed()
        before = host.content()
        for _ in range(9):
            write_anew(host)
            begun = time.monotonic()
            wait_until(lambda: host.content() == before, "the repair", SOON)
            pauses.append(time.monotonic() - begun)
        host.stop()
    assert "chain.contested" in {line["event"] for line in logs}
    assert min(pauses[-3:]) > 0.1


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
    assert (contested[0]["file"], contested[0]["found"]) == ("10-a.conflist", "entry missing")
    assert (contested[0]["plugins"], contested[0]["uid"]) == ("cilium-cni", os.geteuid())
    assert "cni.exclusive=false" in contested[0]["advice"]
    assert contested[0]["repairs"] > 5
    assert len(host.results) <= 9


def test_without_inotify_it_looks_often(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    without_inotify(monkeypatch)
    host.write("10-a.conflist", LIST)
    with capture_logs() as logs:
        host.start()
        host.wait_until_installed()
        overwrite(host)
        host.wait_until_installed()
        host.stop()
    failed = [line for line in logs if line["event"] == "watch.failed"]
    assert [line["problem"] for line in failed] == ["inotify: Too many open files; raise fs.inotify.max_user_instances"]


def test_a_mistake_of_ours_does_not_end_the_repairs(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConfDirectory, "enter", lambda _: 1 // 0)
    host.write("10-a.conflist", LIST)
    host.start()
    wait_until(lambda: "internal error: ZeroDivisionError" in host.ready[1], "the mistake to be told", SOON)
    monkeypatch.undo()
    host.write("10-a.conflist", LIST)
    host.wait_until_installed()


class Rival:
    """istio-cni's agent, as far as its socket and its entry show it."""

    def __init__(self, host: Host, root: Path) -> None:
        self._host, self._socket = host, root / "run" / "log.sock"
        self._socket.parent.mkdir()
        self.entry = {"type": "istio-cni", "cni_agent_run_dir": str(self._socket.parent)}
        self._listening: socket.socket | None = None

    def move(self, directory: Path, named: str) -> None:
        """Listen in this directory, which the entry calls by another name."""
        self._socket = directory / "log.sock"
        self.entry["cni_agent_run_dir"] = named

    def start(self) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self._socket))
        self._listening.listen()
        self.enter()

    def enter(self) -> None:
        """As it does whenever its entry is missing: the last of the list, whoever else is there."""
        there = json.loads((self._host.net / "10-a.conflist").read_text())
        plugins = [each for each in there["plugins"] if each["type"] != "istio-cni"]
        self._host.write("10-a.conflist", {**there, "plugins": [*plugins, self.entry]})

    def die(self) -> None:
        """Its socket and its entry stay."""
        assert self._listening is not None
        self._listening.close()

    def end(self) -> None:
        self.die()
        there = json.loads((self._host.net / "10-a.conflist").read_text())
        plugins = [each for each in there["plugins"] if each["type"] != "istio-cni"]
        self._host.write("10-a.conflist", {**there, "plugins": plugins})


@pytest.fixture
def rival(host: Host, tmp_path: Path) -> Rival:
    (tmp_path / "proc" / "1").mkdir(parents=True)
    (tmp_path / "proc" / "1" / "root").symlink_to("/")
    host.proc = tmp_path / "proc"
    host.write("10-a.conflist", LIST)
    return Rival(host, tmp_path)


def stands_by(host: Host) -> bool:
    return host.types("10-a.conflist") == ["bridge", "istio-cni"] and "istio-cni's agent runs" in host.ready[1]


def test_beside_istio_cnis_agent_the_chain_is_left_to_it_until_it_ends(host: Host, rival: Rival) -> None:
    rival.start()
    with capture_logs() as logs:
        host.start()
        wait_until(lambda: stands_by(host), "the installer to stand by", SOON)
        before = (host.net / "10-a.conflist").stat().st_mtime_ns
        rival.enter()
        rival.enter()
        wait_until(lambda: stands_by(host), "the installer to stand by", SOON)
        assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["chain.left"]
        assert before < (host.net / "10-a.conflist").stat().st_mtime_ns  # by the rival alone
        rival.end()
        host.wait_until_installed()
        host.stop()
    assert "remove istio-cni" in next(line["reason"] for line in logs if line["event"] == "chain.left")


def test_istio_cnis_agent_is_seen_through_the_nodes_own_links(host: Host, rival: Rival, tmp_path: Path) -> None:
    node = tmp_path / "node"
    (node / "var").mkdir(parents=True)
    (node / "var" / "run").symlink_to("/run")  # as on most nodes: of the node, not of the agent's container
    (node / "run" / "istio-cni").mkdir(parents=True)
    (tmp_path / "proc" / "1" / "root").unlink()
    (tmp_path / "proc" / "1" / "root").symlink_to(node)
    rival.move(node / "run" / "istio-cni", "/var/run/istio-cni")
    rival.start()
    host.start()
    wait_until(lambda: stands_by(host), "the installer to stand by", SOON)
    rival.end()
    host.wait_until_installed()


def test_in_shadow_mode_an_agent_that_leaves_the_chain_to_istio_cni_is_ready(host: Host, rival: Rival) -> None:
    rival.start()
    host.may_stand_by = True
    host.start()
    wait_until(lambda: stands_by(host), "the installer to stand by", SOON)
    assert host.ready[0]


def test_istio_cni_that_is_installed_beside_sidestep_has_the_chain_to_itself(host: Host, rival: Rival) -> None:
    host.start()
    host.wait_until_installed()
    rival.start()
    wait_until(lambda: stands_by(host), "the installer to stand by", SOON)
    rival.end()
    host.wait_until_installed()


def test_an_entry_of_an_agent_that_was_killed_is_replaced(host: Host, rival: Rival) -> None:
    rival.start()
    rival.die()
    host.start()
    host.wait_until_installed()
    assert host.types("10-a.conflist") == ["bridge", "sidestep-cni"]
