"""The arithmetic of `make bench-trace`: what counts as met."""

from pathlib import Path

import pytest

from tests.bench.trace import Compared, Told, read


def compared(ratio: float, told: Told, rate: float = 20_000) -> Compared:
    return Compared("new connections", 3, [rate] * 3, [rate * each for each in (0.5, ratio, 1.2)], told)


@pytest.mark.parametrize(
    ("ratio", "lost", "is_met"), [(0.97, 0, True), (0.9699, 0, False), (1.0, 0, True), (1.0, 1, False)]
)
def test_a_trace_may_cost_three_percent_unrounded_and_lose_nothing(ratio: float, lost: int, is_met: bool) -> None:
    found = compared(ratio, Told(90_000, lost))
    assert found.is_met is is_met
    assert f"aim ≥ 0.97: {'met' if is_met else 'NOT MET'}" in found.lines()[0]
    assert "events a second: 30,000" in found.lines()[2]


def test_a_load_that_was_not_reached_is_said() -> None:
    assert "less than" not in compared(1.0, Told()).lines()[1]
    assert "(less than the 10,000 that it is about)" in compared(1.0, Told(), 9_000).lines()[1]


def test_events_and_losses_are_read_from_the_stream(tmp_path: Path) -> None:
    file, told = tmp_path / "trace.json", Told()
    file.write_text(
        '{"time": "x", "event": "connect"}\n{"event": "lost", "count": 5}\n{"time": "x", "event": "inbound"}\n'
    )
    read(file, told)
    assert (told.events, told.lost) == (2, 5)
