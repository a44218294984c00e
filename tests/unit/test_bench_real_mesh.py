"""`make bench-mesh`: what is compared with what, and the page."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.bench.mesh.cpu import Spent
from tests.bench.mesh.load import Sample
from tests.bench.mesh.measure import Figures
from tests.bench.mesh.results import Results
from tests.bench.real_mesh.__main__ import LOADS, bench
from tests.bench.real_mesh.page import page
from tests.bench.real_mesh.pairs import WAYS


def test_istios_plugin_is_compared_with_every_level() -> None:
    assert WAYS == ("iptables", "off", "proxy", "full")


@pytest.mark.parametrize("part", ["HTTP", "tcp_proxy", "ping-pong"])
def test_both_kinds_of_proxying_and_h2_are_loaded(part: str) -> None:
    samples = [_sample(way, rate, name) for name in LOADS for way, rate in (("iptables", 100.0), ("full", 150.0))]
    rows = [line for line in page(_results(*samples)).splitlines() if part in line and "1.50 (1.50–1.50)" in line]
    assert rows


def test_a_failed_request_is_on_the_page() -> None:
    failed = Sample(0, "keepalive-32-http", "proxy", Figures(10, 1.0, 10, 3, 1.0, 2.0), Spent(1.0, 1.0))
    assert "- proxy, keep-alive, 32 conn., HTTP, mTLS: 3" in page(_results(failed))


def test_the_page_can_be_made_again_of_the_figures(tmp_path: Path) -> None:
    _results(_sample("off", 100.0, LOADS[0])).write(tmp_path / "real-mesh.json")
    done = CliRunner().invoke(bench, ["--render", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "real-mesh.md").read_text() == page(_results(_sample("off", 100.0, LOADS[0])))
    assert json.loads((tmp_path / "real-mesh.json").read_text())["scenarios"] == list(WAYS)


def _sample(way: str, rate: float, workload: str) -> Sample:
    return Sample(0, workload, way, Figures(int(rate), 1.0, 1000, 0, 100.0, 200.0), Spent(1.0, 0.5))


def _results(*samples: Sample) -> Results:
    return Results(5, 3, 1, {"mesh": "kubelet v1.36.3"}, list(WAYS), LOADS, 0.0, list(samples))
