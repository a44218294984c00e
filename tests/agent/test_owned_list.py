"""A conf list of our own before the primary one: it follows that, whatever becomes of it, and goes with the setting."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from installer.host.confdir import ConfDirectory
from tests.agent.cni_host import BRIDGE, LIST, OWN, SOON, Host, names
from tests.lab.waiting import wait_until


def delete_own(host: Host) -> None:
    (host.net / OWN).unlink()


def empty_own(host: Host) -> None:
    (host.net / OWN).write_bytes(b"")


def open_own(host: Host) -> None:
    (host.net / OWN).chmod(0o666)


def change_own(host: Host) -> None:
    document = json.loads((host.net / OWN).read_text())
    document["plugins"][-1]["cni_agent_run_dir"] = "/elsewhere"
    host.write(OWN, document)


def everything_but_us(host: Host, name: str) -> dict[str, Any]:
    document = json.loads((host.net / name).read_text())
    return {**document, "plugins": [each for each in document["plugins"] if each["type"] != "sidestep-cni"]}


def test_a_list_of_our_own_leaves_the_primary_one_alone(host: Host) -> None:
    primary = host.write("10-a.conflist", {**LIST, "disableCheck": True})
    before = primary.read_bytes()
    host.start(istio_owned_cni_config=True)
    host.wait_until_installed(OWN)
    assert everything_but_us(host, OWN) == {**LIST, "disableCheck": True}
    assert (host.net / OWN).stat().st_mode & 0o7777 == 0o600
    assert primary.read_bytes() == before
    host.stop()
    assert ConfDirectory(host.chain(), {"type": "sidestep-cni"}).leave() == [OWN]
    assert names(host.net) == ["10-a.conflist"]


def test_a_list_of_our_own_follows_the_primary_one(host: Host) -> None:
    host.start(istio_owned_cni_config=True)
    wait_until(lambda: "waiting for the primary plugin" in host.ready[1], "the installer to wait", SOON)
    host.write("10-a.conf", {"name": "mynet", "cniVersion": "0.4.0", **BRIDGE})
    host.wait_until_installed(OWN)
    for primary in (LIST, {**LIST, "cniVersion": "1.1.0", "plugins": [BRIDGE, {"type": "tuning"}]}):
        host.write("10-a.conflist", primary)
        (host.net / "10-a.conf").unlink(missing_ok=True)
        wait_until(lambda primary=primary: everything_but_us(host, OWN) == primary, "ours to follow", SOON)  # type: ignore[misc]
    assert host.types("10-a.conflist") == ["bridge", "tuning"]


@pytest.mark.parametrize("last", [b"", b'{"name": "net"', None])
def test_without_a_primary_configuration_ours_stays(host: Host, last: bytes | None) -> None:
    primary = host.write("10-a.conflist", LIST)
    host.start(istio_owned_cni_config=True)
    host.wait_until_installed(OWN)
    before = (host.net / OWN).read_bytes()
    if last is None:
        primary.unlink()
    else:
        primary.write_bytes(last)
    wait_until(lambda: f"waiting for the primary plugin to write one; {OWN} stays" in host.ready[1], "it be told", SOON)
    assert (host.net / OWN).read_bytes() == before
    host.write("10-a.conflist", {**LIST, "name": "another"})
    wait_until(lambda: everything_but_us(host, OWN)["name"] == "another", "ours to follow", SOON)


@pytest.mark.parametrize("tamper", [delete_own, empty_own, open_own, change_own])
def test_what_somebody_does_to_ours_is_repaired(host: Host, tamper: Callable[[Host], None]) -> None:
    host.write("10-a.conflist", LIST)
    host.start(istio_owned_cni_config=True)
    host.wait_until_installed(OWN)
    before = (host.net / OWN).read_bytes()
    tamper(host)
    wait_until(lambda: len(host.results) > 1, "the repair", SOON)
    host.wait_until_installed(OWN)
    assert (host.net / OWN).read_bytes() == before
    assert (host.net / OWN).stat().st_mode & 0o7777 == 0o600


def test_what_comes_before_ours_is_told_and_gets_the_entry(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    with capture_logs() as logs:
        host.start(istio_owned_cni_config=True)
        host.wait_until_installed(OWN)
        host.write("00-multus.conf", {"name": "multus", "type": "multus"})
        host.wait_until_installed("00-multus.conflist")
        host.stop()
    assert everything_but_us(host, OWN) == LIST  # multus calls it: with multus in it that would go on for ever
    assert [line["problem"] for line in logs if line["event"] == "chain.not_first"] == [
        "the runtime takes 00-multus.conf: it sorts before ISTIO_OWNED_CNI_CONFIG_FILENAME, which is "
        "00-sidestep-cni.conflist"
    ]
    place = ConfDirectory(host.chain(istio_owned_cni_config=True), {"type": "sidestep-cni"}).examine()
    assert place.file == "00-multus.conflist"
    assert "the runtime takes 00-multus.conflist: it sorts before" in place.remarks[0]


def test_somebody_elses_file_of_that_name_is_not_lost(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    with capture_logs() as logs:
        host.start(istio_owned_cni_config=True, istio_owned_cni_config_filename="10-a.conflist")
        host.wait_until_installed()
        host.stop()
    assert everything_but_us(host, "10-a.conflist") == LIST
    assert [line["problem"] for line in logs if line["event"] == "chain.not_first"] == [
        "ISTIO_OWNED_CNI_CONFIG_FILENAME is 10-a.conflist, a file of another installer; choose another name"
    ]
    assert ConfDirectory(host.chain(), {"type": "sidestep-cni"}).leave() == ["10-a.conflist"]
    assert everything_but_us(host, "10-a.conflist") == LIST


def test_a_list_of_our_own_may_be_made_from_a_chosen_file(host: Host) -> None:
    host.write("05-other.conflist", {**LIST, "name": "other"})
    host.write("10-a.conflist", LIST)
    with capture_logs() as logs:
        host.start(istio_owned_cni_config=True, cni_conf_name="10-a.conflist")
        host.wait_until_installed(OWN)
        host.stop()
    assert everything_but_us(host, OWN) == LIST
    assert [line for line in logs if line["event"] == "chain.not_first"] == []


@pytest.mark.parametrize(
    ("options", "holding"),
    [
        ({}, ["10-a.conflist"]),
        ({"istio_owned_cni_config": True, "istio_owned_cni_config_filename": "02-b.conflist"}, ["02-b.conflist"]),
        ({"chained_cni_plugin": False}, ["YYY-sidestep-cni.conf"]),
    ],
)
def test_a_list_of_our_own_goes_with_the_setting(host: Host, options: dict[str, Any], holding: list[str]) -> None:
    host.write("10-a.conflist", LIST)
    ConfDirectory(host.chain(istio_owned_cni_config=True), {"type": "sidestep-cni"}).enter()
    directory = ConfDirectory(host.chain(**options), {"type": "sidestep-cni"})
    directory.enter()
    assert directory.holding() == holding
    assert directory.enter() == []
    assert not directory.examine().fault


def test_a_primary_configuration_that_had_our_entry_is_followed_without_it(host: Host) -> None:
    host.write("10-a.conflist", LIST)
    entry = {"type": "sidestep-cni"}
    ConfDirectory(host.chain(), entry).enter()
    directory = ConfDirectory(host.chain(istio_owned_cni_config=True), entry)
    directory.enter()
    assert host.types(OWN) == ["bridge", "sidestep-cni"]
    assert directory.leave() == [OWN, "10-a.conflist"]
    assert names(host.net) == ["10-a.conflist"]
    assert json.loads((host.net / "10-a.conflist").read_text()) == LIST
