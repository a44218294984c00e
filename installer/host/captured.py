"""The pods of this node that are captured now, and the words for a command that would end their capture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpf.errors import NotAttached, SidestepError
from bpf.layout import PodFlags
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
    """The names of the running pods that are enrolled, in order, without the shadow pods: Istio's rules capture those.

    A pod runs if its namespace is there: by its steering link, or because it is found. A pod that only another version
    knows has no name here, but the cookie of its namespace. `proc` is a procfs of the node. Raises KernelRefused.
    """
    running = {cookie for layout in layouts(pins) for cookie in steered(layout)}
    names, shadows = _names(pins)
    running -= shadows
    if unsteered := names.keys() - running - shadows:
        with find_netns(unsteered, proc=proc) as found:
            running |= {cookie for cookie, _ in found}
    return sorted(names.get(cookie, f"netns cookie {cookie}") for cookie in running)


def _names(pins: Pins) -> tuple[dict[int, str], set[int]]:
    """The names of the enrolled pods by cookie, and the cookies of the shadow pods among them."""
    try:
        pods: dict[int, Any] = {key.cookie: pod for key, pod in entries(pins.look_only(), "pods")}
    except NotAttached:  # nothing is there, or only what another version has attached
        return {}, set()
    shadows = {cookie for cookie, pod in pods.items() if PodFlags(pod.flags) & PodFlags.SHADOW}
    return {cookie: str(Identity.of(pod)) for cookie, pod in pods.items()}, shadows


def _listed(pods: Sequence[str]) -> str:
    return ", ".join(pods[:_NAMED]) + (f" and {len(pods) - _NAMED} more" if len(pods) > _NAMED else "")
