"""Pods in ambient mode while another version with other maps takes over."""

from pathlib import Path

from bpf.pins import LAYOUT
from tests.lab.ambient import AMBIENT
from tests.lab.node import REPOSITORY
from tests.lab.waiting import wait_until
from tests.node.test_ambient import THROUGH, Bed, bed
from tests.node.test_takeover import CHANGES, another_version


def test_another_layout_takes_pods_in_ambient_mode_over_and_back(tmp_path: Path) -> None:
    other = another_version(tmp_path, CHANGES["all"])
    with bed() as own:
        own.ztunnel()
        alpha, beta = own.pod("alpha", AMBIENT), own.pod("beta", AMBIENT)
        for source, is_ours in ((other, False), (REPOSITORY, True)):
            own.node.agent.terminate()
            own.node.agent.start(source)
            wait_until(lambda: len(_layouts(own)) == 1, "one layout to be left", 30)
            assert (_layouts(own) == {LAYOUT}) is is_ours
            assert own.way(alpha, beta) == THROUGH
            assert own.redirection(alpha) == own.redirection(beta) == "enabled"


def _layouts(own: Bed) -> set[str]:
    return {path.name for path in (own.node.bpffs / "sidestep").glob("v*") if (path / "maps").exists()}
