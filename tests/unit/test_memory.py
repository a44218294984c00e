"""How much memory an agent may use, and whether one before it was killed, as cgroup version 2 has it in files."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from installer.agent import agent
from installer.probe.memory import kills, lowest_limit
from installer.settings import Node

POD = "kubepods-burstable-pod0a1b2c3d_0000_0000_0000_000000000001.slice"


def cgroups(top: Path, *limits: str) -> list[Path]:
    """A container's cgroup, its Pod's, and that of all Pods, with these limits."""
    names = ["kubepods.slice", POD, "cri-containerd-0.scope"]
    found = [top.joinpath(*names[: number + 1]) for number in range(len(names))][::-1]
    for each, limit in zip(found, limits, strict=True):
        each.mkdir(parents=True, exist_ok=True)
        (each / "memory.max").write_text(f"{limit}\n")
    return found


@pytest.mark.parametrize(
    ("limits", "lowest"),
    [
        (("max", "max", "max"), None),
        (("1000", "max", "500000"), 1000),
        (("max", "2000", "1000"), 1000),
    ],
)
def test_the_lowest_limit_counts_wherever_it_is(tmp_path: Path, limits: tuple[str, ...], lowest: int | None) -> None:
    assert lowest_limit(cgroups(tmp_path, *limits)) == lowest


def test_the_greatest_number_of_version_1_is_no_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert lowest_limit([tmp_path]) is None


def test_kills_are_those_of_all_the_pods_containers_and_of_nobody_else(tmp_path: Path) -> None:
    container, pod, everybody = cgroups(tmp_path, "max", "max", "max")
    for cgroup, number in ((container, 0), (pod, 3), (everybody, 9)):
        (cgroup / "memory.events").write_text(f"low 0\nhigh 0\nmax 21\noom 4\noom_kill {number}\noom_group_kill 1\n")
    assert kills([container, pod, everybody]) == 3
    assert kills([container]) == 0
    (pod / "memory.events").unlink()
    assert kills([container, pod, everybody]) == 0


def test_an_agent_tells_of_kills_if_there_were_any(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 2):
        monkeypatch.setattr(agent, "earlier_kills", lambda proc, number=number: number)
        with capture_logs() as logs:
            agent._tell_of_kills(Node())
        assert [(each["event"], each["kills"], each["log_level"]) for each in logs] == [
            ("agent.killed_before", number, "warning")
        ][: bool(number)]
