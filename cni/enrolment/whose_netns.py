"""Finds the network namespaces that pods run in now, through their processes: no CNI call tells of a running pod."""

from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bpf.syscalls import Descriptor
from cni.errors import SandboxInvalid
from cni.netns.processes import Crowd, crowds, netns_of_crowd
from cni.netns.sandbox import addresses_in, visit
from cni.policy.pod import Pod


class Inhabited(NamedTuple):
    """A pod, its processes, and a descriptor of their namespace."""

    pod: Pod
    crowd: Crowd
    netns: int


def inhabited(pods: Collection[Pod], proc: Path) -> Generator[Inhabited, None, None]:
    """Yield each of these pods whose namespace is found. A descriptor is valid until the iterator's next step.

    The namespace of a pod without a process cannot be found. One walk of /proc serves all pods. `proc` is a procfs of
    the node. Needs CAP_SYS_PTRACE to see other users' processes.
    """
    if not pods:
        return
    for pod, crowd in _matched(pods, list(crowds(proc).values()), proc):
        netns = netns_of_crowd(proc, crowd)
        if netns is not None:
            with Descriptor(netns):
                yield Inhabited(pod, crowd, netns)


def _matched(pods: Iterable[Pod], around: list[Crowd], proc: Path) -> Iterator[tuple[Pod, Crowd]]:
    """Each pod with the crowd of its processes.

    A pod is matched by its UID or a container id in the processes' cgroup paths. Some runtimes show neither there; such
    a pod is matched by its address. If several crowds match, the oldest is the pod's: a namespace that one of the pod's
    containers has made is younger.
    """
    by_name = {each: crowd for crowd in reversed(around) for each in (*crowd.containers, *crowd.pod_uids)}
    left = []
    for pod in pods:
        crowd = next((by_name[each] for each in (pod.uid, *pod.container_ids) if each in by_name), None)
        if crowd:
            yield pod, crowd
        elif pod.status.pod_ip:
            left.append(pod)
    if left:
        by_address = {address: crowd for crowd in reversed(around) for address in _addresses(crowd, proc)}
        for pod in left:
            if pod.status.pod_ip in by_address:
                yield pod, by_address[pod.status.pod_ip]


def _addresses(crowd: Crowd, proc: Path) -> list[str]:
    netns = netns_of_crowd(proc, crowd)
    if netns is None:
        return []
    with Descriptor(netns), suppress(SandboxInvalid):
        return [str(each.ip) for each in visit(netns, lambda rtnl: list(addresses_in(rtnl)))]
    return []
