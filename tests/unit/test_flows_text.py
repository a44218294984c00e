"""`sidestep flows` in words and columns: a table that fits 80 columns, and what it does not have is said."""

from typing import Any

import pytest

from installer.commands.flows.flows_table import flows_table, flows_text
from installer.commands.sampling.figures import span


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as where there is no terminal, whatever the environment of these tests says."""
    monkeypatch.setenv("COLUMNS", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "–"),
        (0, "0 s"),
        (1e-9, "<1 µs"),
        (38e-6, "38 µs"),
        (0.0009999, "1.0 ms"),
        (0.0012, "1.2 ms"),
        (0.0204, "20 ms"),
        (1.5, "1.5 s"),
        (59.99, "1.0 min"),
        (90, "1.5 min"),
        (7200, "2.0 h"),
        (86400 * 12, "12 d"),
    ],
)
def test_times_have_the_unit_that_fits(seconds: float | None, words: str) -> None:
    assert span(seconds) == words


def carried(**changes: Any) -> dict[str, Any]:
    blank = {
        "open": 1,
        "closed": 1204,
        "sent_bytes": 1_500_000,
        "received_bytes": 999 * 1024**3,
        "retransmits": 12,
        "rtt_seconds": 0.000123,
        "duration_seconds": 205.0,
        "last_closed": "2026-01-01T00:00:00+00:00",
    }
    return blank | changes


def row(direction: str, verdict: str | None, peer: str, **changes: Any) -> dict[str, Any]:
    port = int(peer.rpartition(":" if ":" in peer else " ")[2])
    return {"direction": direction, "verdict": verdict, "peer": peer, "port": port, **carried(**changes)}


def document(*flows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    whole = {
        "pod": "shop/web-0",
        "namespace": "shop",
        "name": "web-0",
        "outbound": carried(),
        "inbound": carried(open=2, closed=3, sent_bytes=10, received_bytes=20),
        "flows": list(flows),
        "not_told": [],
    }
    return whole | changes


CAPTURED = row("outbound", "captured", "255.255.255.255:65535")
DIRECT = row("outbound", "direct", "10.0.0.7:443", rtt_seconds=None)
INBOUND = row("inbound", None, "port 8080")


def test_a_pods_table_fits_80_columns() -> None:
    text = flows_text(document(CAPTURED, INBOUND), is_wide=False, has_titles=False)
    assert len(text.splitlines()) == 2
    assert max(map(len, text.splitlines())) <= 80
    titled = flows_text(document(CAPTURED, INBOUND), is_wide=False, has_titles=True).splitlines()
    (titles,) = (each for each in titled if "DESTINATION" in each)
    assert len(titles) <= 80
    assert titles.split() == ["DESTINATION", "OPEN", "CLOSED", "SENT", "RECEIVED", "RESENT", "RTT", "LASTED"]


def test_a_row_has_the_counts_of_open_and_closed_connections() -> None:
    text = flows_text(document(DIRECT), is_wide=False, has_titles=False)
    assert text.split() == ["10.0.0.7:443", "1", "1,204", "1.4", "MiB", "999", "GiB", "12", "-", "3.4", "min"]


def test_directions_are_apart_and_summed_in_the_headline() -> None:
    text = flows_text(document(DIRECT, INBOUND), is_wide=False, has_titles=True)
    assert text.startswith("shop/web-0: outbound 1 open, 1,204 closed, sent 1.4 MiB, received 999 GiB; inbound 2 open")
    assert text.index("outbound:\n") < text.index("10.0.0.7:443") < text.index("inbound:\n") < text.index("8080")


def test_of_captured_connections_it_says_which_way_retransmits_and_rtt_are_of() -> None:
    assert "the way to the pod's own proxy" in flows_text(document(CAPTURED), is_wide=False, has_titles=True)
    assert "the way to the pod's own proxy" not in flows_text(document(DIRECT), is_wide=False, has_titles=True)


def test_what_is_not_told_is_below_unless_titles_are_not_wanted() -> None:
    given = document(DIRECT, not_told=["1.0 MiB that the pod has sent past TCP"])
    assert flows_text(given, is_wide=False, has_titles=True).endswith(
        "not told: 1.0 MiB that the pod has sent past TCP\n"
    )
    assert "not told" not in flows_text(given, is_wide=False, has_titles=False)
    assert "shop/web-0: not told: 1.0 MiB" in flows_table([given], is_wide=False, has_titles=True)
    assert len(flows_table([given], is_wide=False, has_titles=False).splitlines()) == 1


def test_open_connections_that_cannot_be_seen_are_unknown_not_none() -> None:
    unseen = document(outbound=carried(open=None), inbound=carried(open=None))
    assert "outbound ? open" in flows_text(unseen, is_wide=False, has_titles=True)
    assert flows_table([unseen], is_wide=False, has_titles=False).split()[:4] == ["shop", "web-0", "-", "2,408"]


def test_a_pods_line_has_both_directions_together_or_wide_apart() -> None:
    assert flows_table([document()], is_wide=False, has_titles=False).split()[2:4] == ["3", "1,207"]
    wide = flows_table([document()], is_wide=True, has_titles=True)
    assert "OUT-SENT" in wide and "IN-RECEIVED" in wide


def test_wide_says_whether_it_was_captured_and_when_the_last_one_closed() -> None:
    text = flows_text(document(CAPTURED), is_wide=True, has_titles=True)
    assert "captured" in text and " d ago" in text


def test_no_pods_are_said_so() -> None:
    assert flows_table([], is_wide=False, has_titles=True) == "no enrolled pods\n"
    assert flows_table([], is_wide=False, has_titles=False) == ""
