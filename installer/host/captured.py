"""The pods of this node that are captured now, and the words for a command that would end their capture."""

from collections.abc import Sequence
from pathlib import Path

from bpf.errors import NotAttached, SidestepError
from bpf.layouts import layouts, steered
from bpf.pins import Pins
from bpf.tables import entries
from cni.enrolment.entries import Identity
from cni.netns.namespaces import find_netns

_NAMED = 20  # pods named in a message


class StillCaptured(SidestepError):
    """The command would end the capture of running pods, and nobody has asked for that. Nothing was done."""

    def __init__(self, pods: Sequence[str], *advice: str) -> None:
        lost = f"{len(pods)} running mesh pods of this node would lose capture, and with it mTLS: {_listed(pods)}"
        super().__init__(f"{lost}; {', '.join(('to end it for them give --end-capture', *advice))}")


def who_lost_capture(pods: Sequence[str]) -> str:
    """A sentence that names the pods whose capture has ended."""
    return f"{len(pods)} running mesh pods are not captured any more: {_listed(pods)}"


def captured_pods(pins: Pins, proc: Path) -> list[str]:
    """The names of the running pods that are enrolled, in order.

    A pod runs if its namespace is there: by its steering link, or because it is found. A pod that only another version
    knows has no name here, but the cookie of its namespace. `proc` is a procfs of the node. Raises KernelRefused.
    """
    running = {cookie for layout in layouts(pins) for cookie in steered(layout)}
    names = _names(pins)
    if unsteered := names.keys() - running:
        with find_netns(unsteered, proc=proc) as found:
            running |= {cookie for cookie, _ in found}
    return sorted(names.get(cookie, f"netns cookie {cookie}") for cookie in running)


def _names(pins: Pins) -> dict[int, str]:
    try:
        return {key.cookie: str(Identity.of(pod)) for key, pod in entries(pins.look_only(), "pods")}  # type: ignore
    except NotAttached:  # nothing is there, or only what another version has attached
        return {}


def _listed(pods: Sequence[str]) -> str:
    return ", ".join(pods[:_NAMED]) + (f" and {len(pods) - _NAMED} more" if len(pods) > _NAMED else "")
