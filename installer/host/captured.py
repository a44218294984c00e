"""The pods of this node that are captured now, for whoever wants to end capture."""

from pathlib import Path

from bpf.errors import NotAttached
from bpf.layouts import layouts, steered
from bpf.pins import Pins
from bpf.tables import entries
from cni.enrolment.entries import Identity
from cni.netns.namespaces import find_netns


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
