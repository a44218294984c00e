"""The state of an enrolled pod in a word or two: the same in every command."""

from cni.enrolment.steered import Steering
from cni.enrolment.strays import PodProcesses
from installer.commands.pods.proxy_state import Proxy, ProxyState

CAPTURED = "captured"
UNKNOWN = "unknown"


def state_of(steering: Steering, processes: PodProcesses, proxy: ProxyState) -> str:
    """The worst that is known of a pod; CAPTURED if nothing is wrong. What can't be looked at is UNKNOWN."""
    if steering in (Steering.NOT_STEERED, Steering.GONE):
        return str(steering)
    if processes.strays:
        return "stray processes"
    if steering is Steering.UNKNOWN or processes.unknown:
        return UNKNOWN
    return CAPTURED if proxy.state is Proxy.LISTENS else f"proxy {proxy.state}"
