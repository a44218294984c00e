"""Pods with a sidecar that are not enrolled, and enrolled pods that Istio's rules capture as well.

To Kubernetes such pods look healthy, so the agent and the commands say what they are.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bpf.syscalls import Descriptor
from cni.errors import SandboxInvalid
from cni.netns.namespaces import find_netns
from cni.netns.netfilter import is_captured_by_istio
from cni.netns.processes import Crowd, crowds, netns_of_crowd
from cni.netns.sandbox import addresses_in, visit
from cni.policy.membership import has_sidecar, skip_pod
from cni.policy.pod import Pod

# why sidestep leaves a running pod alone that has Istio's rules, and why it refuses a new one
RUNNING_WITH_RULES = (
    "Istio's own netfilter rules capture it, until `sidestep takeover` or until the pod is created anew"
)
NEW_WITH_RULES = (
    "istio-cni's netfilter rules are in the pod's network namespace already. Remove istio-cni's plugin from the CNI "
    "chain of this node, and create the pod anew"
)
# of a shadow pod, to its owner
WATCHED = "Istio's netfilter rules capture it; sidestep decides beside them and changes nothing (shadow mode)"
BY_NOBODY = (
    "it was a shadow pod, which Istio's netfilter rules captured, and these rules have gone: nobody captured it. "
    "sidestep enrols it as it does other pods without rules"
)
BOTH = (
    "istio-cni's netfilter rules are in its network namespace as well as sidestep's capture, and either may redirect a "
    "connection. Remove istio-cni's plugin from the CNI chain of this node; `sidestep takeover` removes the pod's rules"
)


class Bystander(NamedTuple):
    """A running pod with a sidecar that is not enrolled. `reason` says why; "" if it should be enrolled."""

    pod: Pod
    reason: str


def bystanders(
    pods: Iterable[Pod], enrolled: Collection[str], agent_namespace: str, excluded: Collection[str]
) -> Iterator[Bystander]:
    """The bystanders among a node's Pods. `enrolled` has the keys (key_of()) of enrolled pods."""
    for pod in pods:
        if pod.is_running and has_sidecar(pod) and key_of(pod.uid, pod.namespace, pod.name) not in enrolled:
            yield Bystander(pod, skip_pod(pod, agent_namespace, excluded) or "")


def key_of(uid: str | None, namespace: str, name: str) -> str:
    """The key that a Pod shares with its entry in the maps: the UID, or namespace and name if the Pod has no UID."""
    return uid or f"{namespace}/{name}"


def crowds_with_rules(proc: Path) -> list[Crowd]:
    """The processes of each pod that Istio's rules capture now, whoever else does. `proc` is a procfs of the node.

    Namespaces that can't be looked at are left out. Raises OSError.
    """
    return [crowd for crowd in crowds(proc).values() if _has_rules(proc, crowd)]


def under_istios_rules(pods: Collection[Pod], proc: Path) -> dict[str, bool]:
    """Whether Istio's rules capture each of these pods now, by key_of(). `proc` is a procfs of the node.

    A pod is found by its UID or its containers in its processes' cgroups, else by its address. Pods that are not found
    are left out. Raises OSError.
    """
    found: dict[str, bool] = {}
    for crowd in crowds(proc).values() if pods else ():
        netns = netns_of_crowd(proc, crowd)
        if netns is None:
            continue
        with Descriptor(netns), suppress(SandboxInvalid):
            addresses, is_ruled = visit(
                netns, lambda rtnl: ({str(each.ip) for each in addresses_in(rtnl)}, is_captured_by_istio())
            )
            for pod in pods:
                if crowd.is_of(pod.uid, pod.container_ids) or pod.status.pod_ip in addresses:
                    found.setdefault(key_of(pod.uid, pod.namespace, pod.name), is_ruled)
    return found


def _has_rules(proc: Path, crowd: Crowd) -> bool:
    netns = netns_of_crowd(proc, crowd)
    if netns is None:
        return False
    with Descriptor(netns):
        try:
            return visit(netns, lambda _: is_captured_by_istio())
        except SandboxInvalid:
            return False


def captured_twice(cookies: Collection[int], proc: Path) -> set[int]:
    """Which of these pods have Istio's rules in their namespace now. `proc` is a procfs of the node.

    Pods whose namespace can't be looked at are left out. Raises OSError, NoProcfs.
    """
    return {cookie for cookie, is_ruled in rules_in(cookies, proc).items() if is_ruled}


def captured_by_nobody(shadows: Collection[int], proc: Path) -> set[int]:
    """Which of these shadow pods have no rules of Istio's now. Otherwise as captured_twice()."""
    return {cookie for cookie, is_ruled in rules_in(shadows, proc).items() if not is_ruled}


def rules_in(cookies: Collection[int], proc: Path) -> dict[int, bool]:
    """Whether each of these pods has Istio's rules in its namespace now, as far as it can be looked at.

    Raises OSError, NoProcfs.
    """
    found: dict[int, bool] = {}
    if not cookies:
        return found
    with find_netns(cookies, proc=proc) as namespaces:
        for cookie, netns in namespaces:
            with suppress(SandboxInvalid):
                found[cookie] = visit(netns, lambda _: is_captured_by_istio())
    return found
