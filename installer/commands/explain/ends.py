"""Finds the pods at both ends of a walk: enrolled pods by the maps, others of this node by their Pods and processes."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

from bpf.attachment import detached
from bpf.errors import SidestepError
from bpf.layout import OUTBOUND_PORT
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from cni.enrolment.steered import steering_of
from cni.enrolment.strays import processes_of
from cni.errors import SandboxInvalid
from cni.netns.processes import crowds, netns_of_crowd
from cni.netns.sandbox import addresses_in, visit
from cni.policy.membership import skip_pod
from cni.policy.pod import Pod
from installer.commands.explain.explainer import Explainer, Protocol
from installer.commands.explain.walk import End
from installer.commands.names import NoSuchPod
from installer.commands.pods.differences import Described, misspelt_in
from installer.commands.pods.enrolled_pods import EnrolledPod, find_pod
from installer.commands.pods.namespace import NamespaceView, look_into, looked_into
from installer.settings import Node


@contextmanager
def enrolled_end(pins: Pins, tables: Tables, pod: EnrolledPod, now: Described, proc: Path) -> Iterator[End]:
    """An enrolled pod. It can be looked at until the context ends."""
    with looked_into(pod, proc) as inside:
        steering = steering_of(pins, tables, [pod.cookie], proc)[pod.cookie]
        processes = processes_of(pins, [pod.cookie], proc)[pod.cookie]
        names, listens = (inside.interfaces, inside.is_heard(OUTBOUND_PORT)) if inside else ({}, True)
        explainer = Explainer(pod, tables, names, steering, processes, detached(pins), listens)
        words = tuple(misspelt_in(now, pod.identity))
        yield End(str(pod.identity), pod.addresses, inside, pod, explainer, steering, processes, misspelt=words)


@contextmanager
def end_called(pins: Pins, tables: Tables, name: str, now: Described, node: Node) -> Iterator[End]:
    """The pod called NAME or NAMESPACE/NAME, enrolled or not. Raises NoSuchPod."""
    with ExitStack() as stack:
        try:
            pod = find_pod(pins, tables, name)
        except NoSuchPod as error:
            yield _other_end(stack, name, now, node, error)
        else:
            yield stack.enter_context(enrolled_end(pins, tables, pod, now, node.proc))


def _other_end(stack: ExitStack, name: str, now: Described, node: Node, error: NoSuchPod) -> End:
    fitting = [each for each in now.pods or () if name in (each.name, f"{each.namespace}/{each.name}")]
    if len(fitting) == 1 and not fitting[0].status.pod_ip:
        raise NoSuchPod(
            f"{fitting[0].namespace}/{fitting[0].name} is not enrolled, and its Pod has no address"
        ) from error
    if len(fitting) != 1:
        where = f"; Pods are not known: {now.problem}" if now.problem else ""
        advice = (
            "if it is on another node, give its ADDRESS:PORT here, and explain its side there with --inbound; names of "
            "hosts and Services are not looked up"
        )
        raise NoSuchPod(f"{error}{where}; {advice}") from error
    (pod,) = fitting
    reason = skip_pod(pod, node.pod_namespace, node.exclude_namespaces) or "it is not enrolled"
    address = frozenset((ip_address(pod.status.pod_ip),))
    return End(f"{pod.namespace}/{pod.name}", address, _inside(stack, pod, node.proc), reason=reason)


def _inside(stack: ExitStack, pod: Pod, proc: Path) -> NamespaceView | None:
    """The namespace of a pod that is not enrolled, found by its processes' cgroups or its address."""
    for crowd in crowds(proc).values():
        netns = netns_of_crowd(proc, crowd)
        if netns is None:
            continue
        with Descriptor(netns), suppress(SandboxInvalid):
            addresses = visit(netns, lambda rtnl: {str(each.ip) for each in addresses_in(rtnl)})
            if crowd.is_of(pod.uid, pod.container_ids) or pod.status.pod_ip in addresses:
                kept = stack.enter_context(Descriptor(os.dup(netns)))
                return look_into(kept.fd)
    return None


def application_port(server: End, protocol: Protocol) -> int:
    """The one port that the server's application listens on. Raises SidestepError if it is not one."""
    sockets = server.inside.of(protocol) if server.inside else None
    if sockets is None:
        raise SidestepError(f"give POD:PORT: who listens in {server.name} can't be looked at")
    proxy = server.pod.entry.proxy_uid if server.pod else None
    ports = sorted({each.port for each in sockets if each.uid != proxy or proxy is None})
    if len(ports) == 1:
        return ports[0]
    kind = "UDP " if protocol == "udp" else ""
    listed = f"{kind}{', '.join(map(str, ports))}" if ports else f"no {kind}port"
    raise SidestepError(f"give {server.name}:PORT: its application listens on {listed}")
