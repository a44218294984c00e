"""The plugin on the host and in the chain: put there, kept there against others, and taken away without a trace."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from installer.host.confdir import ConfDirectory
from installer.host.files import FileRefused
from tests.agent.cni_host import BRIDGE, LIST, SOON, Host, names
from tests.lab.waiting import wait_until


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
    wait_until(lambda: "waiting for the primary plugin" in host.ready[1], "the installer to wait", SOON)
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


def test_a_name_that_now_comes_first_gets_the_entry(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    host.start()
    host.wait_until_installed()
    host.write("05-cilium.conflist", {**LIST, "plugins": [{"type": "cilium-cni"}]})
    host.wait_until_installed("05-cilium.conflist")


def test_a_chosen_file_is_edited_even_if_others_come_first(host: Host) -> None:
    host.write("05-other.conflist", LIST)
    host.write("10-a.conf", {"name": "mynet", **BRIDGE})
    with capture_logs() as logs:
        host.start(cni_conf_name="10-a.conflist")
        host.wait_until_installed()
        host.stop()
    assert host.types("05-other.conflist") == ["bridge"]
    assert [line["problem"] for line in logs if line["event"] == "chain.not_first"] == [
        "CNI_CONF_NAME is 10-a.conflist, but the runtime takes 05-other.conflist"
    ]


@pytest.mark.parametrize("document", [LIST, {"name": "mynet", **BRIDGE}])
def test_a_chosen_file_may_have_any_ending_and_keeps_it(host: Host, document: dict[str, Any]) -> None:
    host.write("05-other.conflist", LIST)
    host.write("10-a.net", document)
    before = host.content()["10-a.net"]
    host.start(cni_conf_name="10-a.net")
    host.wait_until_installed("10-a.net")
    host.stop()
    assert host.types("05-other.conflist") == ["bridge"]
    assert names(host.net) == ["05-other.conflist", "10-a.net"]
    leave = ConfDirectory(host.chain(cni_conf_name="10-a.net"), {}).leave
    assert leave() == ["10-a.net"]
    assert json.loads(host.content()["10-a.net"]) == json.loads(before)


@pytest.mark.parametrize("name", ["10-a", "10-a.net", "10-a.json"])
def test_another_file_is_taken_for_the_chosen_one_between_conf_and_conflist_alone(host: Host, name: str) -> None:
    host.write("10-a.conflist", LIST)
    host.start(cni_conf_name=name)
    wait_until(lambda: "waiting for the primary plugin" in host.ready[1], "the agent to wait", SOON)
    assert host.types("10-a.conflist") == ["bridge"]


def test_a_standalone_network_in_a_file_of_any_name_is_taken_away(host: Host) -> None:
    chosen = {"chained_cni_plugin": False, "cni_conf_name": "istio-cni"}
    host.start(**chosen)
    wait_until(lambda: host.ready[0], "the file", SOON)
    host.stop()
    assert ConfDirectory(host.chain(**chosen), {}).leave() == ["istio-cni"]
    assert names(host.net) == []


def test_a_standalone_network_has_a_file_of_its_own(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    host.start(chained_cni_plugin=False, cni_conf_group_read=True)
    own = host.net / "YYY-sidestep-cni.conf"
    wait_until(lambda: own.exists() and host.ready[0], "the file", SOON)
    assert own.stat().st_mode & 0o7777 == 0o640
    assert json.loads(own.read_text())["type"] == "sidestep-cni"
    assert host.types("10-a.conflist") == ["bridge"]


def test_a_link_in_the_way_is_replaced_not_followed(host: Host, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (host.bin / "sidestep-cni").symlink_to(victim)
    (host.net / "50-link.conflist").symlink_to(victim)
    host.write("10-a.conflist", LIST)
    host.start()
    host.wait_until_installed()
    assert victim.read_text() == "precious"
    assert not (host.bin / "sidestep-cni").is_symlink()


@pytest.mark.parametrize("target", ["elsewhere.conflist", "nowhere"])
def test_a_link_that_the_runtime_goes_by_is_not_passed_over(host: Host, tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere.conflist").write_text(json.dumps(LIST))
    link = host.net / "05-link.conflist"
    link.symlink_to(tmp_path / target)
    host.write("10-a.conflist", LIST)
    host.start()
    wait_until(lambda: host.results == ["CREATE_CNI_CONFIG_FAILURE"], "the failure", SOON)
    assert host.ready == (False, f"{link} is a symbolic link; replace it by the file itself")
    assert host.types("10-a.conflist") == ["bridge"]
    link.unlink()
    host.wait_until_installed()


def test_directories_with_a_files_name_are_passed_over(host: Host) -> None:
    (host.net / "05-dir.conflist").mkdir()
    host.write("10-a.conflist", LIST)
    host.start()
    host.wait_until_installed()


def test_a_list_whose_version_the_plugin_does_not_speak_is_left_alone(host: Host) -> None:
    host.write("10-a.conflist", {**LIST, "cniVersion": "2.0.0"})
    host.start()
    wait_until(lambda: "has cniVersion 2.0.0; sidestep-cni speaks 0.3.1" in host.ready[1], "the refusal", SOON)
    assert host.types("10-a.conflist") == ["bridge"]


def test_directories_that_are_away_are_found_again(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    host.start()
    host.wait_until_installed()
    shutil.rmtree(host.net)
    wait_until(lambda: "net.d: No such file" in host.ready[1], "it to be missed", SOON)
    host.net.mkdir()
    host.write("10-a.conflist", LIST)
    host.wait_until_installed()
    assert host.results == ["SUCCESS", "CREATE_CNI_CONFIG_FAILURE", "SUCCESS"]


@pytest.mark.parametrize(("away", "setting"), [("bin", "MOUNTED_CNI_BIN_DIR"), ("net", "MOUNTED_CNI_NET_DIR")])
def test_a_directory_that_is_not_there_is_told_with_its_setting(host: Host, away: str, setting: str) -> None:
    directory: Path = getattr(host, away)
    directory.rmdir()
    host.start()
    wait_until(lambda: bool(host.ready[1]), "the failure", SOON)
    assert host.ready[1] == f"{directory}: No such file or directory; check that {setting} is this platform's directory"


def test_what_cannot_be_done_is_said_with_the_setting(host: Host) -> None:
    (host.bin / "sidestep-cni").mkdir()
    host.write("10-a.conflist", LIST)
    host.start()
    wait_until(lambda: "sidestep-cni is a directory; remove it" in host.ready[1], "the failure", SOON)
    assert (host.ready[0], host.results) == (False, ["COPY_BINARIES_FAILURE"])
    assert "MOUNTED_CNI_BIN_DIR" in host.ready[1]
    assert host.types("10-a.conflist") == ["bridge"]


def test_an_empty_file_is_in_nobodys_way(host: Host) -> None:
    host.write("10-a.conf", {"name": "one", **BRIDGE})
    (host.net / "10-a.conflist").write_text("")
    host.start()
    wait_until(lambda: names(host.net) == ["10-a.conflist"], "one file")
    host.wait_until_installed()
    assert names(host.net) == ["10-a.conflist"]


@pytest.mark.parametrize("mtu", [1500, 9000])
@pytest.mark.parametrize("suffix", ["conf", "json"])
def test_a_single_plugins_file_that_is_there_again_stays_as_it_is(host: Host, mtu: int, suffix: str) -> None:
    name = f"10-a.{suffix}"
    host.write(name, {"name": "one", **BRIDGE, "mtu": 1500})
    directory = ConfDirectory(host.chain(), {"type": "sidestep-cni"})
    directory.enter()
    again = host.write(name, {"name": "one", **BRIDGE, "mtu": mtu})
    content = again.read_text()
    assert directory.leave() == ["10-a.conflist"]
    assert names(host.net) == [name]
    assert again.read_text() == content


def test_a_list_stays_one_when_something_else_has_its_former_name(host: Host) -> None:
    host.write("10-a.conf", {"name": "one", **BRIDGE})
    directory = ConfDirectory(host.chain(), {"type": "sidestep-cni"})
    directory.enter()
    (host.net / "10-a.conf").write_text("garbage")
    assert directory.leave() == ["10-a.conflist"]
    assert host.types("10-a.conflist") == ["bridge"]
    assert (host.net / "10-a.conf").read_text() == "garbage"
    assert directory.leave() == []


def test_another_files_name_is_never_taken(host: Host) -> None:
    host.write("10-a.conf", {"name": "one", **BRIDGE})
    other = host.write("10-a.conflist", {**LIST, "name": "two"})
    with pytest.raises(FileRefused, match=r"10-a.conflist is in the way of 10-a.conf; remove one of the two"):
        ConfDirectory(host.chain(), {"type": "sidestep-cni"}).enter()
    assert json.loads(other.read_text())["name"] == "two"
