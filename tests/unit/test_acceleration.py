"""What level a node is at, from what was asked for, what the self-test found and who else has socket maps."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest

from bpf import libbpf, offsets
from bpf.acceleration import NodeLevel
from bpf.errors import SidestepError
from bpf.layout import Level
from bpf.offsets import NoOffsets
from bpf.pins import Pins
from bpf.tables import Tables
from cni.errors import InvalidAnnotation
from cni.policy.annotations import policy_of
from cni.policy.pod import Pod
from installer.acceleration import level, selftest
from installer.acceleration.checks import CHECKS
from installer.acceleration.level import judge
from installer.acceleration.selftest import SelfTest

GOOD = {check.name: "" for check in CHECKS}
OTHER = ["their_verdict on map theirs (id 7)"]


def test_where_nothing_is_wrong_the_wanted_level_counts() -> None:
    for each in Level:
        assert judge(each, SelfTest(GOOD), []) == NodeLevel(each, each, "")


@pytest.mark.parametrize("check", [check.name for check in CHECKS if check.needed is Level.PROXY])
def test_a_check_that_every_level_needs_turns_acceleration_off(check: str) -> None:
    node = judge(Level.FULL, SelfTest(GOOD | {check: "it hung"}), [])
    assert node == NodeLevel(Level.FULL, Level.OFF, f"level proxy is not safe on this kernel: {check}: it hung")


def test_a_check_that_full_needs_leaves_proxy() -> None:
    found = SelfTest(GOOD | {"MPTCP listener": "reset"})
    reason = "level full is not safe on this kernel: MPTCP listener: reset"
    assert judge(Level.FULL, found, []) == NodeLevel(Level.FULL, Level.PROXY, reason)
    assert judge(Level.PROXY, found, []) == NodeLevel(Level.PROXY, Level.PROXY, "")


def test_a_difference_is_told_where_applications_meet_it() -> None:
    found = SelfTest(GOOD | {"FIONREAD of other data": "FIONREAD says 0"})
    reason = "on this kernel applications see a difference: FIONREAD of other data: FIONREAD says 0"
    assert judge(Level.FULL, found, []) == NodeLevel(Level.FULL, Level.FULL, reason)
    assert judge(Level.PROXY, found, []) == NodeLevel(Level.PROXY, Level.PROXY, "")


def test_a_check_that_cannot_be_made_here_lowers_nothing_and_is_told() -> None:
    found = SelfTest(GOOD, unseen={"memory limit of a cgroup": "no controller"})
    reason = "not looked at: memory limit of a cgroup: no controller"
    assert judge(Level.PROXY, found, []) == NodeLevel(Level.PROXY, Level.PROXY, reason)
    both = SelfTest(GOOD | {"edge after a short read": "none"}, unseen=found.unseen)
    differs = "on this kernel applications see a difference: edge after a short read: none"
    assert judge(Level.FULL, both, []) == NodeLevel(Level.FULL, Level.FULL, f"{reason}; {differs}")


def test_what_could_not_be_looked_at_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SelfTest(GOOD, unseen={"memory limit of a cgroup": "no controller"})
    monkeypatch.setattr(selftest, "try_kernel", lambda _: found)
    selftest.outcome(Path("/cgroup"), tmp_path)
    assert selftest.kept_outcome(tmp_path) == found


def test_a_check_that_was_not_made_counts_as_failed() -> None:
    made = {name: problem for name, problem in GOOD.items() if name != "reset"}
    assert judge(Level.PROXY, SelfTest(made), []).reason == "level proxy is not safe on this kernel: reset: not tried"


def test_another_owner_of_socket_maps_turns_it_off_by_name() -> None:
    reason = "another program on this node owns sockets: their_verdict on map theirs (id 7)"
    assert judge(Level.PROXY, SelfTest(GOOD), OTHER) == NodeLevel(Level.PROXY, Level.OFF, reason)


def test_no_outcome_no_acceleration() -> None:
    assert judge(Level.FULL, SelfTest({}, "no BTF"), []) == NodeLevel(Level.FULL, Level.OFF, "no BTF")
    assert judge(Level.OFF, SelfTest({}, "no BTF"), OTHER) == NodeLevel(Level.OFF, Level.OFF, "")


def test_what_could_not_be_tried_yet_leaves_the_level_as_it_was() -> None:
    found = SelfTest({}, postponed="no memory")
    assert judge(Level.FULL, found, []) == NodeLevel(Level.FULL, Level.OFF, "not tried yet: no memory")
    reason = "not tried yet: no memory"
    assert judge(Level.FULL, found, [], Level.PROXY) == NodeLevel(Level.FULL, Level.PROXY, reason)
    assert judge(Level.PROXY, found, [], Level.FULL) == NodeLevel(Level.PROXY, Level.PROXY, "")
    assert judge(Level.FULL, found, OTHER, Level.FULL).level is Level.OFF


def test_the_outcome_is_kept_for_this_kernel_and_these_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def once(cgroup: Path) -> SelfTest:
        tried.append(cgroup)
        return SelfTest(GOOD)

    monkeypatch.setattr(selftest, "try_kernel", once)
    for _ in range(2):
        assert selftest.outcome(Path("/cgroup"), tmp_path) == SelfTest(GOOD)
    assert len(tried) == 1
    assert (tmp_path / "selftest.json").stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(selftest, "_identity", lambda: "another kernel")
    selftest.outcome(Path("/cgroup"), tmp_path)
    (tmp_path / "selftest.json").write_text("{")
    selftest.outcome(Path("/cgroup"), tmp_path)
    assert len(tried) == 3


@pytest.mark.parametrize(
    "found",
    [
        SelfTest({}, "no cgroup"),
        SelfTest({}, postponed="no memory"),
        SelfTest(GOOD | {"reset": "nothing instead of a reset"}),
    ],
)
def test_a_failure_is_not_kept(found: SelfTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "try_kernel", lambda _: found)
    assert selftest.outcome(Path("/cgroup"), tmp_path) == found
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SelfTest(GOOD | {"FIONREAD of other data": "FIONREAD says 0"})
    monkeypatch.setattr(selftest, "try_kernel", lambda _: found)
    selftest.outcome(Path("/cgroup"), tmp_path)
    assert (tmp_path / "selftest.json").exists()


def test_a_machine_short_of_memory_for_sockets_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []

    def failing(place: Path) -> SelfTest:
        tried.append(place)
        (tmp_path / "sockstat").write_text(sockets.replace("99", str(after)))
        return SelfTest(GOOD | {"reset": "nothing was redirected"})

    sockets = "sockets: used 64\nTCP: inuse 1 orphan 0 tw 0 alloc 67 mem 99\nUDP: inuse 0 mem 500\n"
    monkeypatch.setattr(selftest, "_SOCKETS", tmp_path / "sockstat")
    monkeypatch.setattr(selftest, "_MARKS", tmp_path / "tcp_mem")
    monkeypatch.setattr(selftest, "_try", failing)
    (tmp_path / "sockstat").write_text(sockets)
    (tmp_path / "tcp_mem").write_text("99\t200\t300\n")
    said = "TCP on this machine holds 99 pages, net.ipv4.tcp_mem allows 99 at ease"
    assert selftest.try_kernel(tmp_path) == SelfTest({}, postponed=said)
    assert not tried
    (tmp_path / "tcp_mem").write_text("100\t200\t300\n")
    after = 99
    assert selftest.try_kernel(tmp_path).unsafe
    after = 100  # it became short meanwhile
    assert selftest.try_kernel(tmp_path).postponed.startswith("TCP on this machine holds 100 pages")


class Clock:
    """Stands in for the module time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Kernel:
    """What a keeper sees of it: outcomes in their order, the last one for ever; and the node's level."""

    outcomes: list[SelfTest]
    node: NodeLevel = field(default_factory=lambda: NodeLevel(Level.OFF, Level.OFF, ""))
    tried: int = 0
    meanwhile: Callable[[], object] = lambda: None

    def outcome(self, *_: Path) -> SelfTest:
        self.meanwhile()
        self.tried += 1
        return self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]

    def set_level(self, _: object, node: NodeLevel) -> None:
        self.node = node


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(level, "time", clock)
    return clock


def keeper(kernel: Kernel, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> level.LevelKeeper:
    monkeypatch.setattr(level, "outcome", kernel.outcome)
    monkeypatch.setattr(level, "level_of", lambda _: kernel.node)
    monkeypatch.setattr(level, "set_level", kernel.set_level)
    monkeypatch.setattr(level, "other_owners", lambda _: iter(()))
    monkeypatch.setattr(level, "is_possible", lambda _: True)
    return level.LevelKeeper(cast(Pins, None), cast(Tables, None), Path("/cgroup"), run_dir)


BAD = SelfTest(GOOD | {"reset": "nothing was redirected"})


def test_what_has_failed_is_tried_again_ever_more_seldom(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel([BAD])
    kept = keeper(kernel, tmp_path, monkeypatch)
    times = []
    for _ in range(6000):
        before = kernel.tried
        assert kept.settle(Level.PROXY).level is Level.OFF
        if kernel.tried > before:
            times.append(clock.now)
        clock.now += 1
    assert [later - earlier for earlier, later in pairwise(times)][:4] == [10, 20, 40, 80]
    assert max(later - earlier for earlier, later in pairwise(times)) == 1800
    kernel.outcomes = [SelfTest(GOOD)]
    clock.now += 1800
    assert kept.settle(Level.PROXY).level is Level.PROXY


def test_what_could_not_be_tried_is_tried_soon(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel([*[SelfTest({}, postponed="no memory")] * 20, SelfTest(GOOD)])
    kept = keeper(kernel, tmp_path, monkeypatch)
    for _ in range(20):
        assert kept.settle(Level.FULL) == NodeLevel(Level.FULL, Level.OFF, "not tried yet: no memory")
        clock.now += 10
    assert kept.settle(Level.FULL).level is Level.FULL


def test_what_a_command_has_found_counts_for_an_agent_whose_own_test_failed(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = keeper(Kernel([BAD]), tmp_path, monkeypatch)
    assert agent.settle(Level.FULL).level is Level.OFF
    monkeypatch.setattr(selftest, "try_kernel", lambda _: SelfTest(GOOD))
    assert selftest.outcome(Path("/cgroup"), tmp_path).is_good
    assert agent.settle(Level.FULL) == NodeLevel(Level.FULL, Level.FULL, "")


def test_what_is_asked_for_during_the_self_test_counts(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel([SelfTest(GOOD)])
    kernel.meanwhile = lambda: kernel.set_level(None, NodeLevel(Level.FULL, Level.FULL, ""))
    assert keeper(kernel, tmp_path, monkeypatch).settle(Level.PROXY).wanted is Level.FULL


def test_an_error_of_the_system_does_not_end_the_keeper(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, wanted = Kernel([SelfTest(GOOD)]), threading.Event()
    errors = [OSError("no file descriptors"), SidestepError("no map")]

    def owners(_: object) -> Iterator[str]:
        if errors:
            raise errors.pop()
        wanted.set()
        return iter(())

    kept = keeper(kernel, tmp_path, monkeypatch)
    monkeypatch.setattr(level, "other_owners", owners)
    monkeypatch.setattr(level, "_LOOK_AGAIN_SECONDS", 0.01)
    with kept.running(Level.PROXY):
        assert wanted.wait(20)
    assert kernel.node.level is Level.PROXY


def test_offsets_are_those_of_this_kernel() -> None:
    text = offsets.definitions() + offsets.definitions(offsets.TASKS)
    told = dict(line.removeprefix("#define ").split() for line in text.splitlines())
    assert {"TCP_WRITE_SEQ", "TCP_COPIED_SEQ", "SOCK_USER_DATA", "FILE_FLAGS"} <= set(told)
    # a page counter begins with what is used
    assert [name for name, at in told.items() if int(at) == 0] in ([], ["COUNTER_USAGE"])


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (offsets.Field("X", b"tcp_sock", b"no_such_field", 4), "the kernel's struct tcp_sock has no field no_such"),
        (offsets.Field("X", b"no_such_struct", b"x", 4), "the kernel's type information has no struct no_such_struct"),
        (offsets.Field("X", b"tcp_sock", b"snd_una", 8), "snd_una of the kernel's struct tcp_sock has 4 bytes at bit"),
    ],
)
def test_implausible_type_information_is_refused(field: offsets.Field, said: str) -> None:
    with pytest.raises(NoOffsets, match=said):
        offsets.definitions((field,))


def test_a_kernel_without_type_information_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf.LIBBPF, "btf__load_vmlinux_btf", lambda: ctypes.c_void_p(None).value)
    with pytest.raises(NoOffsets, match="CONFIG_DEBUG_INFO_BTF"):
        offsets.definitions()


def test_a_kernel_that_is_locked_down_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offsets, "_LOCKDOWN", tmp_path / "lockdown")
    (tmp_path / "lockdown").write_text("none integrity [confidentiality]\n")
    with pytest.raises(NoOffsets, match="locked down"):
        offsets.definitions()


def _pod(**annotations: str) -> Pod:
    return Pod.model_validate({"metadata": {"name": "a", "namespace": "b", "annotations": annotations}, "spec": {}})


def test_a_pod_is_at_level_proxy_unless_it_says_otherwise() -> None:
    assert policy_of(_pod()).acceleration is Level.PROXY
    for each in Level:
        assert policy_of(_pod(**{"sidestep.io/acceleration": str(each)})).acceleration is each


@pytest.mark.parametrize("value", ["", "Full", "on", "2"])
def test_any_other_level_is_refused(value: str) -> None:
    with pytest.raises(InvalidAnnotation, match=r'^sidestep\.io/acceleration: ".*" is not a level of .*; give off, '):
        policy_of(_pod(**{"sidestep.io/acceleration": value}))
