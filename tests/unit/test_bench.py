"""The benchmark's arithmetic: what load generators say, ratios within rounds, aims, tables and plots."""

import json
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from click.testing import CliRunner

from tests.bench.mesh.__main__ import Choice, bench, chosen
from tests.bench.mesh.aims import AIMS, verdicts
from tests.bench.mesh.beside import BLOCKS
from tests.bench.mesh.cpu import Spent, busy, charged
from tests.bench.mesh.load import Sample
from tests.bench.mesh.markdown import page
from tests.bench.mesh.measure import Figures, Unreadable, from_h2load, from_iperf3, from_wrk
from tests.bench.mesh.plots import plot
from tests.bench.mesh.ratios import Metric, Samples
from tests.bench.mesh.results import Results, read
from tests.bench.mesh.scenarios import SCENARIOS
from tests.bench.mesh.workloads import WORKLOADS

WRK = """Running 1s test @ http://10.1.2.3:8080/
  1 threads and 32 connections
  9359 requests in 1.02s, 1.34MB read
{"requests": 9359, "bytes": 1403850, "duration": 1015536, "p50": 2914, "p99": 12307, "errors": 2}
"""
H2LOAD = """finished in 1.00s, 400.00 req/s, 309.71KB/s
requests: 203 total, 204 started, 203 done, 200 succeeded, 1 failed, 2 errored, 0 timeout
status codes: 200 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 309.71KB (317143) total, 181.27KB (185616) headers (space savings 51.02%), 11.33KB (11601) data
"""


def sample(
    number: int, scenario: str, rate: float, p50: float = 100.0, workload: str = "keepalive-32-tcp", cpu: float = 1.0
) -> Sample:
    figures = Figures(int(rate * 2), 2.0, 4_000_000, 0, p50, 2 * p50)
    return Sample(number, workload, scenario, figures, Spent(cpu, cpu / 2))


def results(*samples: Sample) -> Results:
    scenarios = ["no-mesh", "iptables", "nftables", "off", "proxy", "full", "unix"]
    return Results(5, 3, 1, {"kernel": "6.18"}, scenarios, list(WORKLOADS), 0.0, list(samples))


def test_wrk_is_read_from_the_line_of_its_script() -> None:
    assert from_wrk(WRK) == Figures(9359, 1.015536, 1403850, 2, 2914.0, 12307.0)


def test_h2load_is_read_from_summary_and_log() -> None:
    log = "".join(f"1795248975237{n:03}\t200\t{n}\n" for n in range(200))
    assert from_h2load(H2LOAD, log) == Figures(200, 0.5, 317143, 3, 100.0, 198.0)


def test_iperf3_counts_what_arrived_in_writes() -> None:
    said = {"end": {"sum_received": {"bytes": 6400, "seconds": 2.0}}}
    assert from_iperf3(json.dumps(said), 64) == Figures(100, 2.0, 6400, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: from_wrk("unable to connect to 10.1.2.3:8080 Connection refused"),
        lambda: from_h2load("", ""),
        lambda: from_h2load(H2LOAD.replace("200 succeeded", "0 succeeded"), ""),
        lambda: from_h2load(H2LOAD, ""),
        lambda: from_iperf3("iperf3: error", 64),
        lambda: from_iperf3('{"error": "unable to connect", "end": {}}', 64),
        lambda: from_iperf3('{"end": {"sum_received": {"bytes": 0, "seconds": 1}}}', 64),
    ],
)
def test_a_failed_load_generator_is_no_figure(call: object) -> None:
    with pytest.raises(Unreadable):
        call()  # type: ignore[operator]


def test_processor_time_leaves_out_idle_waiting_and_stolen() -> None:
    ticks = busy("cpu  100 10 50 5000 600 7 33 9999 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    assert ticks == pytest.approx(2.0)
    assert charged("usage_usec 1500000\nuser_usec 1\n") == 1.5


def test_ratios_are_made_within_a_round() -> None:
    samples = Samples(
        [
            *(sample(n, "iptables", rate) for n, rate in enumerate((1000, 2000, 4000))),
            *(sample(n, "proxy", rate) for n, rate in enumerate((1500, 2400, 8000))),
        ]
    )
    ratio = samples.ratio("keepalive-32-tcp", "proxy", Metric.RATE)
    assert ratio is not None and (ratio.median, ratio.low, ratio.high) == (1.5, 1.2, 2.0)


def test_a_round_that_failed_on_either_side_is_left_out() -> None:
    samples = Samples([sample(0, "iptables", 1000), sample(1, "iptables", 1000), sample(1, "full", 3000)])
    ratio = samples.ratio("keepalive-32-tcp", "full", Metric.RATE)
    assert ratio is not None and (ratio.low, ratio.high) == (3.0, 3.0)
    assert samples.ratio("keepalive-32-tcp", "proxy", Metric.RATE) is None


def test_an_aim_is_met_from_its_bound_on() -> None:
    samples = Samples(
        [
            sample(0, "iptables", 1000, p50=100, cpu=1.0),
            sample(0, "off", 1200),
            sample(0, "proxy", 1200, p50=100, cpu=1.08),  # nine tenths of the processor time for each request
            sample(0, "full", 1900, p50=101),
            sample(0, "unix", 2000),
        ]
    )
    rows = [row for row in verdicts(samples) if row.workload == "keepalive-32-tcp"]
    assert {(row.metric, row.level, row.against): row.verdict for row in rows} == {
        (Metric.RATE, "full", "unix"): "met",
        (Metric.RATE, "proxy", "off"): "met",
        (Metric.CPU, "proxy", "iptables"): "met",
        (Metric.P99, "proxy", "iptables"): "met",
        (Metric.P99, "full", "iptables"): "**not met**",
    }


def test_every_aim_is_shown_also_when_nothing_was_measured() -> None:
    rows = verdicts(Samples([]))
    assert {row.verdict for row in rows} == {"not measured"}
    assert {row.workload for row in rows} == set(WORKLOADS)
    assert len({(row.metric, row.against) for row in rows}) == len(AIMS)
    assert {row.level for row in rows if row.workload.startswith("new-connection")} == {"proxy", "full"}
    assert not any(row.against == "unix" for row in rows if row.workload.startswith("new-connection"))


def test_the_page_says_what_was_aimed_at_and_what_failed() -> None:
    run = results(sample(0, "iptables", 1000), sample(0, "off", 1200), sample(0, "proxy", 1100))
    run.failures.append("round 1: full, stream-64: iperf3: nothing was received")
    text = page(run)
    assert "| requests/s | proxy | off | 0.92 (0.92–0.92) | ≥ 1.0 | **not met** |" in text
    assert "nothing was received" in text
    assert "Too few rounds" in text and "not quiet" not in text


def test_what_istio_does_with_most_traffic_comes_first() -> None:
    titles = [each.title for each in WORKLOADS.values()]
    first = [title.endswith("HTTP, mTLS") for title in titles].index(False)
    assert first == 7 and all("mTLS" in title for title in titles[:11]) and "mTLS" not in "".join(titles[11:])


def test_a_plot_is_an_svg_with_a_bar_for_every_ratio() -> None:
    run = results(sample(0, "iptables", 1000), sample(0, "proxy", 1200), sample(0, "unix", 2000))
    drawn = ElementTree.fromstring(plot(run, Metric.RATE))
    figures = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "1.20" in figures and "2.00" in figures
    assert ElementTree.fromstring(plot(results(), Metric.P50)) is not None


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = results(sample(0, "iptables", 1000), sample(1, "full", 1200))
    run.write(tmp_path / "mesh.json")
    assert read(tmp_path / "mesh.json") == run


def test_figures_of_other_envoys_get_no_page_that_says_they_spoke_mtls(tmp_path: Path) -> None:
    results(sample(0, "iptables", 1000)).write(tmp_path / "mesh.json")
    done = CliRunner().invoke(bench, ["--render", "--output", str(tmp_path)])
    assert done.exit_code == 2 and "is of Envoys without mTLS" in done.output


def test_what_is_named_is_run_and_iptables_always() -> None:
    assert chosen(()).scenarios == list(SCENARIOS) and chosen(()).blocks == list(BLOCKS)
    assert chosen(("full", "stream-64")) == Choice(["iptables", "full"], ["stream-64"], [])
    assert chosen(("stream-64", "tax")) == Choice(list(SCENARIOS), ["stream-64"], ["tax"])
    assert chosen(("tax",)) == Choice([], [], ["tax"])
    with pytest.raises(click.UsageError, match="keepalive-32-tcp"):
        chosen(("keepalive",))
