"""What the agent remembers of pods that it refused, and what a pod's owner is told of an error."""

import errno

import pytest

from bpf.errors import KernelRefused, SidestepError, TableFull
from bpf.syscalls import refused
from cni.enrolment import known_pods
from cni.enrolment.refusals import Refusals, for_owners
from cni.errors import InvalidAnnotation, NotCaptured, RegistrationFailed, SandboxInvalid
from cni.policy.annotations import EXCLUDE_OUTBOUND_PORTS, policy_of
from cni.policy.pod import Metadata, Pod


def pod(name: str = "web", **annotations: str) -> Pod:
    return Pod(metadata=Metadata(name=name, namespace="default", uid="u", annotations=annotations))


def wrong() -> InvalidAnnotation:
    with pytest.raises(InvalidAnnotation) as raised:
        policy_of(pod(**{EXCLUDE_OUTBOUND_PORTS: "80-90"}))
    return raised.value


def test_a_refusal_has_its_annotation_its_words_and_how_often_it_was() -> None:
    known = Refusals()
    for _ in range(2):
        known.refuse("default", "web", wrong())
    known.refuse("default", "other", NotCaptured("try again"))
    first, second = known.documents()
    assert (first["pod"], first["annotation"], first["times"]) == ("default/web", EXCLUDE_OUTBOUND_PORTS, 2)
    assert first["words"].startswith(f'{EXCLUDE_OUTBOUND_PORTS}: "80-90" is not a port')
    assert (second["annotation"], second["times"]) == ("", 1)
    assert first["at"] <= second["at"] and first["at"].endswith("+00:00")


def test_it_is_known_until_the_pod_is_enrolled_or_no_longer_listed() -> None:
    known = Refusals()
    for name in ("enrolled", "gone", "new"):
        known.refuse("default", name, wrong())
    known.forget("default", "enrolled")
    known.keep_listed([pod("gone")])
    known.keep_listed([])
    assert [each["pod"] for each in known.documents()] == ["default/new"]  # which no list had yet


def test_the_oldest_are_forgotten_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_pods, "LIMIT", 2)
    known = Refusals()
    for name in ("a", "b", "c"):
        known.refuse("default", name, wrong())
    assert [each["pod"] for each in known.documents()] == ["default/b", "default/c"]


def raised_from(error: SidestepError, cause: Exception) -> SidestepError:
    try:
        raise error from cause
    except SidestepError as made:
        return made


KERNELS = refused("bpf_map_update_elem", "listeners", errno.EOPNOTSUPP)


@pytest.mark.parametrize(
    "error",
    [
        KERNELS,
        raised_from(RegistrationFailed(f"default/web could not be enrolled: {KERNELS}"), KERNELS),
        raised_from(SandboxInvalid("setns: Operation not permitted"), PermissionError(1, "Operation not permitted")),
    ],
)
def test_an_owner_never_reads_the_kernels_words(error: SidestepError) -> None:
    told = for_owners(error)
    assert "bpf_" not in told and "Operation not" not in told
    assert told.startswith("the kernel refused a step of it")


@pytest.mark.parametrize(
    "error",
    [
        wrong(),
        raised_from(RegistrationFailed("BPF map routes is full at 10 entries"), TableFull("BPF map routes is full")),
        raised_from(
            NotCaptured("its cgroup /a is not below /b: /a does not exist"), KernelRefused("/a does not exist")
        ),
    ],
)
def test_what_was_written_for_people_stays_as_it_is(error: SidestepError) -> None:
    assert for_owners(error) == str(error)
