"""What level a node is at, from what was asked for, what the self-test found and who else has socket maps."""

import ctypes
from pathlib import Path

import pytest

from bpf import offsets
from bpf.acceleration import NodeLevel
from bpf.layout import Level
from bpf.offsets import NoOffsets
from cni.annotations import policy_of
from cni.errors import InvalidAnnotation
from cni.pod import Pod
from installer.acceleration import selftest
from installer.acceleration.checks import CHECKS
from installer.acceleration.level import judge
from installer.acceleration.selftest import Outcome

GOOD = {check.name: "" for check in CHECKS}
OTHER = ["their_verdict on map theirs (id 7)"]


def test_where_nothing_is_wrong_the_wanted_level_counts() -> None:
    for level in Level:
        assert judge(level, Outcome(GOOD), []) == NodeLevel(level, level, "")


@pytest.mark.parametrize("check", [check.name for check in CHECKS if check.needed is Level.PROXY])
def test_a_check_that_every_level_needs_turns_acceleration_off(check: str) -> None:
    node = judge(Level.FULL, Outcome(GOOD | {check: "it hung"}), [])
    assert node == NodeLevel(Level.FULL, Level.OFF, f"level proxy is not safe on this kernel: {check}: it hung")


def test_a_check_that_full_needs_leaves_proxy() -> None:
    found = Outcome(GOOD | {"MPTCP listener": "reset"})
    reason = "level full is not safe on this kernel: MPTCP listener: reset"
    assert judge(Level.FULL, found, []) == NodeLevel(Level.FULL, Level.PROXY, reason)
    assert judge(Level.PROXY, found, []) == NodeLevel(Level.PROXY, Level.PROXY, "")


def test_a_difference_is_told_where_applications_meet_it() -> None:
    found = Outcome(GOOD | {"FIONREAD of other data": "FIONREAD says 0"})
    reason = "on this kernel applications see a difference: FIONREAD of other data: FIONREAD says 0"
    assert judge(Level.FULL, found, []) == NodeLevel(Level.FULL, Level.FULL, reason)
    assert judge(Level.PROXY, found, []) == NodeLevel(Level.PROXY, Level.PROXY, "")


def test_a_check_that_was_not_made_counts_as_failed() -> None:
    made = {name: problem for name, problem in GOOD.items() if name != "reset"}
    assert judge(Level.PROXY, Outcome(made), []).reason == "level proxy is not safe on this kernel: reset: not tried"


def test_another_owner_of_socket_maps_turns_it_off_by_name() -> None:
    reason = "another program on this node owns sockets: their_verdict on map theirs (id 7)"
    assert judge(Level.PROXY, Outcome(GOOD), OTHER) == NodeLevel(Level.PROXY, Level.OFF, reason)


def test_no_outcome_no_acceleration() -> None:
    assert judge(Level.FULL, Outcome({}, "no BTF"), []) == NodeLevel(Level.FULL, Level.OFF, "no BTF")
    assert judge(Level.OFF, Outcome({}, "no BTF"), OTHER) == NodeLevel(Level.OFF, Level.OFF, "")


def test_the_outcome_is_kept_for_this_kernel_and_these_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def once(cgroup: Path) -> Outcome:
        tried.append(cgroup)
        return Outcome(GOOD)

    monkeypatch.setattr(selftest, "try_kernel", once)
    for _ in range(2):
        assert selftest.outcome(Path("/cgroup"), tmp_path) == Outcome(GOOD)
    assert len(tried) == 1
    assert (tmp_path / "selftest.json").stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(selftest, "_identity", lambda: "another kernel")
    selftest.outcome(Path("/cgroup"), tmp_path)
    (tmp_path / "selftest.json").write_text("{")
    selftest.outcome(Path("/cgroup"), tmp_path)
    assert len(tried) == 3


@pytest.mark.parametrize("found", [Outcome({}, "no memory"), Outcome(GOOD | {"reset": "nothing instead of a reset"})])
def test_a_failure_is_not_kept(found: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "try_kernel", lambda _: found)
    assert selftest.outcome(Path("/cgroup"), tmp_path) == found
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Outcome(GOOD | {"FIONREAD of other data": "FIONREAD says 0"})
    monkeypatch.setattr(selftest, "try_kernel", lambda _: found)
    selftest.outcome(Path("/cgroup"), tmp_path)
    assert (tmp_path / "selftest.json").exists()


def test_offsets_are_those_of_this_kernel() -> None:
    text = offsets.definitions() + offsets.definitions(offsets.TASKS)
    told = dict(line.removeprefix("#define ").split() for line in text.splitlines())
    assert {"TCP_WRITE_SEQ", "TCP_SND_UNA", "TCP_COPIED_SEQ", "TCP_RCV_NXT", "SOCK_USER_DATA"} <= set(told)
    assert all(int(at) > 0 for at in told.values())


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
    monkeypatch.setattr(offsets._LIBBPF, "btf__load_vmlinux_btf", lambda: ctypes.c_void_p(None).value)
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
    for level in Level:
        assert policy_of(_pod(**{"sidestep.io/acceleration": str(level)})).acceleration is level


@pytest.mark.parametrize("value", ["", "Full", "on", "2"])
def test_any_other_level_is_refused(value: str) -> None:
    with pytest.raises(InvalidAnnotation, match=r'^sidestep\.io/acceleration: ".*" is not a level of .*; give off, '):
        policy_of(_pod(**{"sidestep.io/acceleration": value}))
