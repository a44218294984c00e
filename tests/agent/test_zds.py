"""The agent's side of ZDS, against a double of ztunnel, with real sockets and real network namespaces."""

import socket
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bpf.errors import SidestepError
from installer.ambient import connection as connections
from installer.ambient.connection import Held, ZtunnelAway, ZtunnelRefused
from installer.ambient.protocol import ProtocolError, Workload, add, delete, hello_version, keep, refusal_in
from installer.ambient.protocol import snapshot_sent as sent
from installer.ambient.server import ZdsServer
from tests.lab.netns_fds import Namespace, namespaces, occupied
from tests.lab.waiting import wait_until
from tests.lab.zds_client import PORTS, Ztunnel, wait_ready


def workload(number: int) -> Workload:
    return Workload(f"uid-{number}", f"pod-{number}", "shop", "cart")


@dataclass
class Lab:
    """A server, what it tells a new ztunnel, and namespaces to hand over."""

    path: Path
    netns: list[Namespace]
    snapshot: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = ZdsServer(self.path, self._snapshot)

    def _snapshot(self) -> Generator[Held, None, None]:
        yield from list(self.snapshot)

    def held(self, number: int) -> Held:
        each = self.netns[number]
        return Held(workload(number), each.fd, each.cookie)

    def add(self, number: int, netns: int | None = None) -> None:
        each = self.netns[number if netns is None else netns]
        self.server.add(workload(number), each.fd, each.cookie)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with namespaces(4) as made:
        lab = Lab(tmp_path / "ztunnel.sock", made)
        with lab.server.running():
            yield lab


@contextmanager
def ztunnel(lab: Lab, ports: tuple[int, ...] = PORTS) -> Iterator[Ztunnel]:
    with Ztunnel(lab.path, ports).running() as connected:
        wait_ready(connected)
        wait_until(lambda: not lab.server.why_away(), "the server to know it")
        yield connected


@contextmanager
def raw(lab: Lab) -> Iterator[socket.socket]:
    """A peer that says what the test says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(10)
        peer.connect(str(lab.path))
        yield peer


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines as short as a test can bear."""
    for module in ("installer.ambient.connection", "installer.ambient.server"):
        monkeypatch.setattr(f"{module}.ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(connections, "_OWED_SECONDS", 1.0)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_records_are_those_of_istios_agent() -> None:
    assert add(Workload("u", "n", "s", "a")).hex() == "0a0e0a017512090a016e120173" + "1a0161"
    assert keep("u").hex() == "2a030a0175"
    assert delete("u").hex() == "1203120175"
    assert sent().hex() == "1a00"
    assert hello_version(b"\x08\x01") == 1
    assert refusal_in(b"\x0a\x00") == ""
    assert refusal_in(b"\x0a\x04\x0a\x02no") == "no"


@pytest.mark.parametrize("record", [b"", b"\xff", b"\x0a\x05", b"\x12\x00"])
def test_what_is_no_answer_does_not_pass_for_one(record: bytes) -> None:
    with pytest.raises(ProtocolError):
        refusal_in(record)


def test_the_longest_names_of_kubernetes_fit_into_a_record_and_longer_ones_are_refused() -> None:
    assert len(add(Workload("u" * 36, "n" * 253, "s" * 63, "a" * 253))) <= 1024
    with pytest.raises(ProtocolError, match="1024"):
        add(Workload("u", "n" * 1024, "s", "a"))


def test_a_ztunnel_gets_every_pod_then_the_end_of_the_snapshot(lab: Lab) -> None:
    lab.snapshot = [lab.held(0), Held(workload(1)), lab.held(2)]
    with ztunnel(lab) as told:
        assert [(each.kind, each.uid) for each in told.messages] == [
            ("add", "uid-0"),
            ("keep", "uid-1"),
            ("add", "uid-2"),
            ("snapshot", ""),
        ]
        assert told.described["uid-0"] == ("pod-0", "shop", "cart")
        assert {uid: each.namespace for uid, each in told.proxies.items()} == {
            "uid-0": lab.netns[0].identity,
            "uid-2": lab.netns[2].identity,
        }
        assert lab.server.holds("uid-0") == lab.netns[0].cookie
        assert lab.server.holds("uid-1") is None


def test_a_pod_whose_namespace_is_not_known_is_kept_by_a_ztunnel_that_has_it(lab: Lab) -> None:
    with ztunnel(lab) as told:
        lab.add(0)
        lab.add(1)
        lab.snapshot = [Held(workload(0))]
        told.disconnect()
        wait_until(lambda: told.connections == 2 and told.is_ready, "it to connect anew")
        assert list(told.proxies) == ["uid-0"]


def test_a_pod_is_handed_over_and_taken_back(lab: Lab) -> None:
    with ztunnel(lab) as told:
        lab.add(0)
        assert told.proxies["uid-0"].namespace == lab.netns[0].identity
        assert lab.server.holds("uid-0") == lab.netns[0].cookie
        lab.server.delete("uid-0")
        assert not told.proxies and lab.server.holds("uid-0") is None
        assert not [each for each in told.messages if each.refusal]


def test_a_second_add_of_a_namespace_starts_nothing_and_one_of_another_replaces_the_proxy(lab: Lab) -> None:
    with ztunnel(lab) as told:
        lab.add(0)
        first = told.proxies["uid-0"]
        lab.add(0)
        assert told.proxies["uid-0"] is first
        lab.add(0, netns=1)
        assert told.proxies["uid-0"].namespace == lab.netns[1].identity
        assert lab.server.holds("uid-0") == lab.netns[1].cookie


def test_without_a_ztunnel_an_add_fails_with_the_sockets_path(lab: Lab) -> None:
    with pytest.raises(ZtunnelAway, match=r"no ztunnel is connected to .*ztunnel\.sock"):
        lab.add(0)
    lab.server.delete("uid-0")
    assert "no ztunnel is connected" in lab.server.why_away()


def test_during_an_upgrade_pods_come_to_the_newest_and_are_taken_back_from_all(lab: Lab) -> None:
    with ztunnel(lab, ports=()) as old:
        lab.add(0)
        lab.snapshot = [lab.held(0)]
        with ztunnel(lab, ports=()) as new:
            wait_until(lambda: lab.server.connected == 2, "both to be connected")
            lab.add(1)
            assert old.received("add") == ["uid-0"]
            assert new.received("add") == ["uid-0", "uid-1"]
            lab.server.delete("uid-0")
            assert old.received("del") == new.received("del") == ["uid-0"]
            lab.server.delete("uid-1")
            assert old.received("del") == new.received("del") == ["uid-0", "uid-1"]
        wait_until(lambda: lab.server.connected == 1, "the new one to be gone")


def test_if_the_newest_goes_only_what_the_older_one_has_taken_counts(lab: Lab) -> None:
    with ztunnel(lab, ports=()) as old:
        lab.add(0)
        lab.snapshot = [lab.held(0)]
        with ztunnel(lab, ports=()):
            lab.add(1)
            assert lab.server.holds("uid-1") == lab.netns[1].cookie
        wait_until(lambda: lab.server.connected == 1, "the new one to be gone")
        assert lab.server.holds("uid-0") == lab.netns[0].cookie
        assert lab.server.holds("uid-1") is None
        lab.add(1)
        assert old.received("add") == ["uid-0", "uid-1"]


def test_a_refusal_is_told_with_ztunnels_words_and_another_attempt_may_succeed(lab: Lab) -> None:
    with ztunnel(lab) as told:
        with occupied(lab.netns[0].fd, 15008):
            with pytest.raises(ZtunnelRefused, match="failure to start proxy: Address already in use"):
                lab.add(0)
            assert lab.server.holds("uid-0") is None
            lab.add(1)
        lab.add(0)
        assert lab.server.holds("uid-0") == lab.netns[0].cookie
        assert told.connections == 1


def test_a_refusal_in_the_snapshot_does_not_keep_the_other_pods_from_ztunnel(lab: Lab) -> None:
    lab.snapshot = [lab.held(0), lab.held(1)]
    with occupied(lab.netns[0].fd, 15008), Ztunnel(lab.path).running() as told:
        wait_until(lambda: not lab.server.why_away(), "the snapshot")
        assert list(told.proxies) == ["uid-1"]
        assert lab.server.holds("uid-0") is None
        assert lab.server.holds("uid-1") == lab.netns[1].cookie


@pytest.mark.usefixtures("impatient")
def test_a_ztunnel_that_does_not_answer_fails_the_add_and_an_answer_that_comes_late_still_counts(lab: Lab) -> None:
    with ztunnel(lab) as told:
        told.answers.clear()
        with pytest.raises(ZtunnelAway, match="has not answered"):
            lab.add(0)
        assert lab.server.holds("uid-0") is None
        told.answers.set()
        wait_until(lambda: lab.server.holds("uid-0") is not None, "the late answer")
        lab.add(1)
        assert told.connections == 1


@pytest.mark.usefixtures("impatient")
def test_a_request_nobody_waits_for_any_more_is_not_sent(lab: Lab) -> None:
    with ztunnel(lab) as told:
        told.answers.clear()
        for number in (0, 1):
            with pytest.raises(ZtunnelAway):
                lab.add(number)
        told.answers.set()
        wait_until(lambda: lab.server.holds("uid-0") is not None, "the late answer")
        lab.server.delete("uid-2")
        assert told.received("add") == ["uid-0"]


@pytest.mark.usefixtures("impatient")
def test_a_ztunnel_that_never_answers_is_dropped_and_gets_a_snapshot_when_it_comes_again(lab: Lab) -> None:
    lab.snapshot = [lab.held(0)]
    with ztunnel(lab) as told:
        told.answers.clear()
        with pytest.raises(ZtunnelAway):
            lab.add(1)
        wait_until(lambda: lab.server.connected == 0, "it to be dropped")
        assert lab.server.holds("uid-0") is None
        told.answers.set()
        wait_until(lambda: lab.server.holds("uid-0") is not None, "it to come again")
        assert told.connections == 2


@pytest.mark.usefixtures("impatient")
def test_a_ztunnel_that_does_not_answer_its_snapshot_is_dropped(lab: Lab) -> None:
    lab.snapshot = [lab.held(0)]
    with raw(lab) as peer:
        peer.send(b"\x08\x01")
        assert peer.recv(1024)[:1] == b"\x0a"
        assert peer.recv(1024) == b""
    assert lab.server.why_away()


@pytest.mark.usefixtures("impatient")
def test_a_peer_that_does_not_greet_is_dropped(lab: Lab) -> None:
    with raw(lab) as peer:
        assert peer.recv(1024) == b""
    assert lab.server.connected == 0


def test_a_ztunnel_that_dies_in_the_middle_fails_what_waits_for_it_at_once(lab: Lab) -> None:
    with ztunnel(lab) as told:
        lab.add(0)
        told.dies_after = 1
        with pytest.raises(ZtunnelAway, match="has gone"):
            lab.add(1)
        wait_until(lambda: lab.server.connected == 0, "the server to notice")
        assert lab.server.holds("uid-0") is None


def test_that_a_ztunnel_has_gone_is_noticed_without_a_request(lab: Lab) -> None:
    with ztunnel(lab):
        assert lab.server.connected == 1
    wait_until(lambda: lab.server.connected == 0, "the server to notice")


@pytest.mark.parametrize("said", [b"\x0a\x00", b"x" * 2000])
def test_a_ztunnel_that_speaks_unasked_is_dropped(lab: Lab, said: bytes) -> None:
    with ztunnel(lab) as told:
        told.say(said)
        wait_until(lambda: told.connections == 2, "it to be dropped, and to come again")


def test_an_answer_too_long_for_a_record_ends_the_connection(lab: Lab) -> None:
    with raw(lab) as peer:
        peer.send(b"\x08\x01")
        peer.recv(1024)
        peer.send(b"\x0a\x00" + b"\x00" * 2000)
        assert peer.recv(1024) == b""


@pytest.mark.usefixtures("impatient")
def test_more_requests_than_the_queue_holds_fail_at_once_and_leave_no_descriptors(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_QUEUE", 3)
    problems: list[str] = []

    def hand_over(number: int) -> None:
        try:
            lab.server.add(workload(number), lab.netns[0].fd, lab.netns[0].cookie)
        except ZtunnelAway as error:
            problems.append(str(error))

    with ztunnel(lab) as told:
        told.answers.clear()
        before = open_fds()
        threads = [threading.Thread(target=hand_over, args=(number,)) for number in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert sum("wait for ztunnel already" in each for each in problems) == 4
        assert sum("has not answered" in each for each in problems) == 4
        told.answers.set()
        wait_until(lambda: lab.server.holds("uid-0") is not None or told.connections == 2, "the queue to be empty")
        lab.server.delete("uid-0")
        wait_until(lambda: open_fds() <= before, "the descriptors to be closed")


def test_a_crashing_ztunnel_is_taken_five_times_a_second_at_most(lab: Lab) -> None:
    accepted, until = 0, time.monotonic() + 1.0
    with ExitStack() as peers:
        while time.monotonic() < until:
            peer = peers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
            with suppress(BlockingIOError):
                peer.connect(str(lab.path))
                peer.send(b"\x08\x01")
            time.sleep(0.02)
        accepted = lab.server.connected
    assert 1 <= accepted <= 6


def test_a_server_that_starts_again_takes_over_the_path_and_its_ztunnel(tmp_path: Path) -> None:
    path = tmp_path / "ztunnel.sock"
    with namespaces(1) as made, ExitStack() as second, Ztunnel(path).running() as told:
        old, new = Lab(path, made), Lab(path, made)
        new.snapshot = [Held(workload(0))]
        with old.server.running():
            wait_ready(told)
            old.add(0)
            second.enter_context(new.server.running())  # before the first has ended
        wait_until(lambda: not new.server.why_away(), "it to come to the new one")
        assert path.exists()
        assert told.received("keep") == ["uid-0"]
        assert told.proxies["uid-0"].namespace == made[0].identity


def test_a_ztunnel_outlives_the_servers_restart_with_its_proxies(tmp_path: Path) -> None:
    path = tmp_path / "ztunnel.sock"
    with namespaces(1) as made, Ztunnel(path).running() as told:
        first = Lab(path, made)
        with first.server.running():
            wait_ready(told)
            first.add(0)
            proxy = told.proxies["uid-0"]
        assert not path.exists()
        second = Lab(path, made, [Held(workload(0), made[0].fd, made[0].cookie)])
        with second.server.running():
            wait_until(lambda: second.server.holds("uid-0") == made[0].cookie, "it to come again")
            assert told.proxies["uid-0"] is proxy


def test_a_socket_that_somebody_removes_is_made_again(lab: Lab) -> None:
    lab.path.unlink()
    wait_until(lab.path.exists, "the socket")
    with ztunnel(lab):
        lab.add(0)


def test_only_root_may_connect(lab: Lab) -> None:
    assert lab.path.stat().st_mode & 0o777 == 0o600


def test_what_is_in_the_way_of_the_socket_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in ((tmp_path / "file" / "x.sock", "file: File exists"), (tmp_path / ("x" * 120), "too long")):
        with pytest.raises(SidestepError, match=words), Lab(path, []).server.running():
            pass


def test_the_end_of_the_server_fails_what_still_waits(tmp_path: Path) -> None:
    with namespaces(1) as made:
        lab = Lab(tmp_path / "ztunnel.sock", made)
        problems: list[str] = []

        def hand_over() -> None:
            try:
                lab.add(0)
            except ZtunnelAway as error:
                problems.append(str(error))

        with Ztunnel(lab.path).running() as told:
            waiting = threading.Thread(target=hand_over)
            with lab.server.running():
                wait_ready(told)
                wait_until(lambda: not lab.server.why_away(), "the server to know it")
                told.answers.clear()
                waiting.start()
                time.sleep(0.1)
            waiting.join(3)
            assert not waiting.is_alive() and len(problems) == 1
