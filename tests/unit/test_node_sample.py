"""Rates from two samples, and the pages and screens that are made of them, for any number of pods."""

from datetime import UTC, datetime
from ipaddress import ip_address

import pytest
from rich.console import Console

from bpf.acceleration import NodeLevel
from bpf.layout import TOTALS, Level, PodFlags, TrafficEntry
from cni.enrolment.entries import Identity
from installer.commands.report.drawing import draw
from installer.commands.report.page import render
from installer.commands.report.view import NodeView, too_short
from installer.commands.sampling import figures
from installer.commands.sampling.flows import PROXY, Flow, FlowEnd
from installer.commands.sampling.sample import Counts, Fill, PodSample, Rates, Sample, rates_between
from installer.commands.top.screen import ORDERS, screen
from installer.verdict.verdict import Finding, State, Verdict

WELL = Verdict((), 0)
MESSAGES = [field[0] for field in TrafficEntry._fields_]


def counts(value: float, **messages: float) -> Counts:
    return Counts(dict.fromkeys(TOTALS, value), dict.fromkeys(MESSAGES, 0.0) | messages)


def pod(number: int, value: float, name: str = "") -> PodSample:
    identity = Identity(f"uid{number}", name or f"pod-{number}", "default", f"c{number}", "net", "eth0")
    address = ip_address("10.0.0.0") + number + 1
    return PodSample(number, identity, (address,), PodFlags(0), 1337, Level.PROXY, True, counts(value))


def sample(at: float, *pods: PodSample, total: float = 0) -> Sample:
    level = NodeLevel(Level.PROXY, Level.PROXY, "")
    return Sample(at, True, level, {each.cookie: each for each in pods}, counts(total))


def test_a_rate_is_the_difference_by_the_seconds() -> None:
    rates = rates_between(sample(10, pod(1, 100), total=100), sample(12, pod(1, 150), total=150))
    assert rates.seconds == 2
    assert rates.pods[1].of("outbound", "captured") == rates.total.of("outbound", "captured") == 25


def test_a_new_pod_began_at_nothing_and_one_that_is_gone_is_not_there() -> None:
    rates = rates_between(sample(0, pod(1, 100)), sample(2, pod(2, 30)))
    assert set(rates.pods) == {2}
    assert rates.pods[2].captured == 15 * sum(verdict == "captured" for _, verdict in TOTALS)


def test_a_counter_that_began_anew_gives_no_negative_rate() -> None:
    assert rates_between(sample(0, pod(1, 100)), sample(1, pod(1, 7))).pods[1].of("inbound", "captured") == 7


def test_no_time_no_rate() -> None:
    assert rates_between(sample(5, pod(1, 1)), sample(5, pod(1, 9))).pods[1].captured == 0


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01, "<0.1"), (0.06, "0.1"), (12.34, "12.3"), (99.97, "100"), (1234.5, "1,234")]
)
def test_rates_are_written_short(value: float, text: str) -> None:
    assert figures.rate(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (812, "812 B"), (1500, "1.5 KiB"), (5 << 30, "5.0 GiB")])
def test_sizes_have_units(value: float, text: str) -> None:
    assert figures.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0 %"), (0.0001, "<0.1 %"), (0.055, "5.5 %"), (0.9999, ">99.9 %"), (1, "100 %")],
)
def test_shares_never_round_to_what_they_are_not(value: float | None, text: str) -> None:
    assert figures.share(value) == text


def view(*pods: PodSample, verdict: Verdict = WELL, flows: tuple[Flow, ...] = ()) -> NodeView:
    taken = sample(1, *pods)
    rates = Rates(1.0, {each.cookie: each.counts for each in pods}, counts(1))
    fills = (Fill("pods", len(pods), 4096),)
    return NodeView("node-1", "6.18", datetime(2026, 1, 2, tzinfo=UTC), taken, rates, verdict, fills, flows)


@pytest.mark.parametrize("number", [0, 1, 250])
def test_there_is_a_page_for_any_number_of_pods(number: int) -> None:
    page = render(view(*(pod(each, each) for each in range(number))))
    assert page.count("default/pod-") >= number
    assert page.rstrip().endswith("</html>")


def test_names_cannot_smuggle_markup_into_the_page() -> None:
    page = render(view(pod(1, 1, name="<script>alert(1)</script>")))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_page_begins_with_the_verdict_and_what_to_do() -> None:
    finding = Finding(State.WRONG, "programs", "connect4 not attached", "start the agent")
    page = render(view(pod(1, 1), verdict=Verdict((finding,), 1)))
    assert page.index("WRONG") < page.index("programs: connect4 not attached") < page.index("start the agent")
    assert "Nothing on this node needs attention" not in page


def test_connections_that_no_socket_shows_are_on_the_page() -> None:
    """The counters know how many came in; nobody knows from where."""
    seen = Flow(FlowEnd(None, ip_address("10.9.9.9")), FlowEnd(1), opened=4.0)
    rates = Rates(2.0, {1: Counts({("inbound", "captured"): 10.0}, {})}, counts(1))
    (found,) = too_short([seen], rates)
    assert (found.target, found.opened) == (FlowEnd(1), 6.0)
    assert list(too_short([found, seen], rates)) == []
    assert "not known: connections between two looks" in render(view(pod(1, 1), flows=(found,)))


def test_labels_of_lines_do_not_touch() -> None:
    pods = [pod(number, number) for number in range(1, 6)]
    flows = [Flow(FlowEnd(a), FlowEnd(b), opened=1.0, alive=1) for a in (1, 2, 3) for b in (4, 5)]
    for flow in flows:
        flow.ways[PROXY, PROXY] += 1
    places = [(each.label_x, each.label_y) for each in draw(view(*pods, flows=tuple(flows))).curves if each.label]
    assert len(places) == len(flows)
    for number, (x, y) in enumerate(places):
        assert all(abs(x - a) > 84 or abs(y - b) > 16 for a, b in places[:number]), places


def drawn(number: int, order: str, width: int = 120, height: int = 24) -> list[str]:
    pods = [pod(each, each) for each in range(number)]
    rates = Rates(1.0, {each.cookie: each.counts for each in pods}, counts(number))
    console = Console(width=width, height=height)
    with console.capture() as captured:
        chosen = next(each for each in ORDERS if each.name == order)
        console.print(screen(sample(1, *pods), rates, chosen, height, width))
    return captured.get().splitlines()


@pytest.mark.parametrize("number", [0, 1, 250])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_screen_is_never_larger_than_the_terminal(number: int, width: int) -> None:
    lines = drawn(number, "captured", width)
    assert len(lines) <= 24
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_a_pods_name_gets_the_room(width: int) -> None:
    name = "deployment-6b746f74dc-9rlmh"
    console = Console(width=width, height=24)
    one = pod(1, 1, name=name)
    rates = Rates(1.0, {1: one.counts}, counts(1))
    with console.capture() as captured:
        console.print(screen(sample(1, one), rates, ORDERS[0], 24, width))
    assert f"default/{name} " in captured.get()


def test_the_busiest_pods_come_first() -> None:
    lines = drawn(250, "captured")
    assert "default/pod-249" in next(line for line in lines if "default/" in line)
    assert "more pods below; sorted by captured" in lines[-1]
    assert "default/pod-0 " in next(line for line in drawn(250, "name") if "default/" in line)
