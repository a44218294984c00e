"""What the agent notes of connections that were refused or denied: what is new since the last look."""

from typing import Any, cast

import pytest

from bpf.layout import TOTALS, TallyEntry
from bpf.tables import Tables
from cni.enrolment import failures
from cni.enrolment.entries import Identity
from cni.enrolment.failures import Failures

REFUSED, DENIED = TOTALS.index(("inbound", "refused")), TOTALS.index(("outbound", "denied"))
CAPTURED, UNREACHABLE = TOTALS.index(("outbound", "captured")), TOTALS.index(("outbound", "unreachable"))


class Counters:
    """The pods' counters, by cookie."""

    def __init__(self) -> None:
        self.of: dict[int, TallyEntry] = {}

    @property
    def tallies(self) -> Any:
        return self

    def get(self, key: Any) -> TallyEntry | None:
        return self.of.get(key.cookie)

    @property
    def uncaptured(self) -> Any:
        """Nothing of it is listed."""
        return self

    def every(self) -> list[Any]:
        return []

    def count(self, cookie: int, kind: int, more: int = 1) -> None:
        self.of.setdefault(cookie, TallyEntry()).connections[kind] += more


def identities(*cookies: int) -> dict[int, Identity]:
    return {cookie: Identity(f"u{cookie}", f"pod-{cookie}", "shop", "c", "net", "eth0") for cookie in cookies}


def told(noted: Failures) -> list[tuple[str, str, str, int]]:
    return [(each["pod"], each["direction"], each["verdict"], each["count"]) for each in noted.documents()]


def test_what_has_failed_since_the_last_look_is_noted_by_pod_and_kind() -> None:
    counters = Counters()
    noted = Failures(cast(Tables, counters))
    counters.count(1, REFUSED, 5)  # before the agent
    noted.look(identities(1))
    assert told(noted) == []
    for kind, more in ((REFUSED, 2), (DENIED, 1), (CAPTURED, 9), (UNREACHABLE, 9)):
        counters.count(1, kind, more)
    counters.count(2, DENIED, 3)
    noted.look(identities(1, 2))  # the second pod is new
    noted.look(identities(1, 2))
    assert told(noted) == [
        ("shop/pod-1", "inbound", "refused", 2),
        ("shop/pod-1", "outbound", "denied", 1),
        ("shop/pod-2", "outbound", "denied", 3),
    ]
    assert noted.documents()[0]["at"].endswith("+00:00")


def test_counters_that_began_again_count_from_nothing() -> None:
    counters = Counters()
    noted = Failures(cast(Tables, counters))
    counters.count(1, REFUSED, 5)
    noted.look(identities(1))
    counters.of[1] = TallyEntry()
    counters.count(1, REFUSED, 2)
    noted.look(identities(1))
    assert told(noted) == [("shop/pod-1", "inbound", "refused", 2)]


def test_a_pod_without_counters_yet_is_no_fault() -> None:
    noted = Failures(cast(Tables, Counters()))
    noted.look(identities(1))
    noted.look(identities(1))
    assert told(noted) == []


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "LIMIT", 2)
    counters = Counters()
    noted = Failures(cast(Tables, counters))
    noted.look({})
    for _ in range(3):
        counters.count(1, REFUSED)
        noted.look(identities(1))
    assert len(noted.documents()) == 2
