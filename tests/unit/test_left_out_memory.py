"""What the agent remembers of pods that are not captured: each is told of once for a reason, within a bound."""

from structlog.testing import capture_logs

from cni.enrolment.known_pods import LIMIT
from cni.enrolment.left_out import LeftOut, LetPass
from cni.policy.pod import Metadata, Pod

WHY = "namespace legacy is in exclude_namespaces"


class Events:
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        """Nothing warns here."""
        raise AssertionError

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        """Keep it."""
        self.told.append((pod.uid or "", message))


def let_pass(container: str = "c1", uid: str = "u1", name: str = "old") -> LetPass:
    return LetPass("legacy", name, uid, container, WHY)


def running(uid: str = "u1") -> Pod:
    return Pod(metadata=Metadata(name="old", namespace="legacy", uid=uid))


def test_what_its_add_has_told_the_watch_does_not_tell_again() -> None:
    events = Events()
    known = LeftOut(events)
    with capture_logs() as logs:
        known.let_pass(let_pass())
        known.is_running(running(), WHY)
        known.let_pass(let_pass("c2"))  # kubelet tries again with another sandbox
    assert [each["event"] for each in logs] == ["pod.skipped"]
    assert events.told == [("u1", f"sidestep does not capture this pod: {WHY}")]
    assert known.let_past() == [let_pass("c2")]


def test_another_reason_or_another_pod_of_the_name_is_told() -> None:
    events = Events()
    known = LeftOut(events)
    known.let_pass(let_pass())
    known.is_running(running(), WHY)
    known.is_running(running(), "the istio-init container sets up capture itself")
    known.is_running(running("u2"), WHY)
    assert [uid for uid, _ in events.told] == ["u1", "u1", "u2"]


def test_a_pod_that_the_watch_does_not_know_to_have_a_sidecar_has_no_event() -> None:
    events = Events()
    LeftOut(events).let_pass(let_pass())
    assert events.told == []


def test_a_runtime_that_gives_no_uid_has_nothing_told_twice() -> None:
    events = Events()
    known = LeftOut(events)
    known.let_pass(let_pass(uid=""))
    known.is_running(running(), WHY)
    assert len(events.told) == 1


def test_after_its_del_a_pod_is_not_listed_and_the_watch_that_has_it_still_is_silent() -> None:
    events = Events()
    known = LeftOut(events)
    known.let_pass(let_pass())
    known.leave("c1")
    known.is_running(running(), WHY)
    assert known.let_past() == [] and events.told == []


def test_what_the_list_had_and_has_no_more_is_forgotten_and_what_it_has_not_yet_is_kept() -> None:
    known = LeftOut()
    known.let_pass(let_pass())
    known.let_pass(let_pass("c2", "u2", "new"))
    known.keep_listed([running()])
    known.keep_listed([])
    assert [each.name for each in known.let_past()] == ["new"]


def test_a_later_pod_of_the_name_is_one_that_no_list_had_yet() -> None:
    known = LeftOut()
    known.let_pass(let_pass())
    known.keep_listed([running()])
    known.let_pass(let_pass("c2", "u2"))
    known.keep_listed([])
    assert known.let_past() == [let_pass("c2", "u2")]


def test_a_sandbox_that_is_no_pod_is_known_by_its_container_and_has_no_event() -> None:
    events = Events()
    known = LeftOut(events)
    for container in ("c1", "c2"):
        known.let_pass(LetPass("", "", "", container, "not a Kubernetes pod"))
    known.let_pass(LetPass("", "name", "", "c3", "not a Kubernetes pod"))
    assert [each.title for each in known.let_past()] == ["container c1", "container c2", "container c3"]
    assert events.told == []


def test_the_oldest_are_forgotten_beyond_the_limit() -> None:
    known = LeftOut()
    with capture_logs():
        for number in range(LIMIT + 3):
            known.let_pass(let_pass(f"c{number}", f"u{number}", f"pod-{number}"))
    assert len(known.let_past()) == LIMIT
    assert known.let_past()[0].name == "pod-3"
