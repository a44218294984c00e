"""The state of an enrolled pod in a word or two: the same in every command."""

from bpf.attachment import detached
from bpf.hooks import CGROUP_HOOKS
from bpf.layout import PodFlags
from bpf.pins import Pins
from cni.enrolment.steered import Steering
from cni.enrolment.strays import PodProcesses
from installer.commands.pods.proxy_state import Proxy, ProxyState
from installer.verdict.node import not_attached

CAPTURED = "captured"
UNKNOWN = "unknown"
SHADOW = "shadow"
# of pods in ambient mode: ztunnel has it, or does not have it yet
AMBIENT, PENDING = "ambient", "pending"
# all is as it should be
WELL = (CAPTURED, SHADOW, AMBIENT)


def state_of(flags: PodFlags, steering: Steering, processes: PodProcesses, proxy: ProxyState) -> str:
    """The worst that is known of a pod; CAPTURED or AMBIENT if nothing is wrong. What can't be looked at is UNKNOWN.

    A shadow pod is captured by Istio's rules, if by anybody, so nothing of sidestep's can be wrong with it. An ambient
    pod's proxy is ztunnel, which listens in the pod as long as it has it.
    """
    if PodFlags.SHADOW in flags and steering is not Steering.GONE:
        return SHADOW
    if steering in (Steering.NOT_STEERED, Steering.GONE):
        return str(steering)
    if processes.strays:
        return "stray processes"
    if steering is Steering.UNKNOWN or processes.unknown:
        return UNKNOWN
    if PodFlags.AMBIENT in flags:
        return AMBIENT if proxy.state is Proxy.LISTENS else PENDING
    return CAPTURED if proxy.state is Proxy.LISTENS else f"proxy {proxy.state}"


def idle_programs(pins: Pins) -> str:
    """Which programs are attached nowhere, in the words of `sidestep status`; "" if all are attached somewhere."""
    gone = detached(pins, [hook.name for hook in CGROUP_HOOKS])
    return not_attached([hook.name for hook in CGROUP_HOOKS if hook.name in gone]) if gone else ""


def reason_of(state: str, steering: Steering, processes: PodProcesses, idle: str) -> str:
    """Why a state is UNKNOWN, or what it leaves out: `idle` programs. "" if the state says everything itself."""
    if idle or state != UNKNOWN:
        return idle
    return steering.words if steering is Steering.UNKNOWN else processes.words
