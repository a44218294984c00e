"""`sidestep coverage` in words and columns: a table that fits 80 columns, and what it does not have is said."""

from datetime import UTC, datetime
from typing import Any

import pytest

from installer.commands.coverage.coverage_table import coverage_table, coverage_text, share


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as where there is no terminal, whatever the environment of these tests says."""
    monkeypatch.setenv("COLUMNS", "")


def row(**changes: Any) -> dict[str, Any]:
    whole = {
        "peer": "[2001:db8:1234:5678::1]:443",
        "protocol": "udp",
        "count": 12,
        "rule": "UDP",
        "why": "UDP is not captured",
        "annotation": None,
        "process": {"pid": 7, "uid": 1000, "command": "node"},
        "last": datetime.now(UTC).isoformat(),
    }
    return whole | changes


def document(**changes: Any) -> dict[str, Any]:
    whole = {
        "pod": "shop/deployment-6b746f74dc-9rlmh",
        "namespace": "shop",
        "name": "deployment-6b746f74dc-9rlmh",
        "on_uncaptured": "allow",
        "covered": 0.9996,
        "captured": 9996,
        "past": 4,
        "refused": 1,
        "past_the_proxy": [row()],
        "refusals": [row(peer="10.0.0.1:25", rule="deny", why="denied", annotation={"name": "a", "value": "25"})],
        "not_told": [],
    }
    return whole | changes


@pytest.mark.parametrize(
    ("covered", "words"), [(None, None), (1, "100 %"), (0.99999, "99.9 %"), (0.5, "50.0 %"), (0, "0.0 %")]
)
def test_a_share_is_whole_only_if_nothing_went_past(covered: float | None, words: str | None) -> None:
    assert share(covered) == words


def test_both_tables_fit_a_terminal() -> None:
    for text in (coverage_table([document()], has_titles=True), coverage_text(document(), has_titles=False)):
        assert max(map(len, text.splitlines())) <= 80, text
    assert "deployment-6b746f74dc-9rlmh" in coverage_table([document()], has_titles=True)


def test_what_is_not_told_is_below_unless_titles_are_not_wanted() -> None:
    given = document(covered=1, past=0, past_the_proxy=[], refusals=[], not_told=["what these processes send: sh"])
    assert "deployment-6b746f74dc-9rlmh: not told: what these" in coverage_table([given], has_titles=True)
    assert "not told: what these processes send: sh" in coverage_text(given, has_titles=True)
    assert "not told" not in coverage_table([given], has_titles=False)


def test_each_reason_is_told_once_with_its_annotation() -> None:
    text = coverage_text(document(past_the_proxy=[row(), row(peer="10.0.0.2:53")]), has_titles=True)
    assert text.count("UDP: UDP is not captured") == 1
    assert 'deny: denied; a: "25"' in text


def test_a_pod_without_traffic_is_not_called_covered() -> None:
    text = coverage_text(document(covered=None, captured=0, past=0, past_the_proxy=[], refusals=[]), has_titles=True)
    assert "not known how much is captured" in text and "100 %" not in text
