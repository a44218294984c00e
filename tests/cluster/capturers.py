"""Pods that start after something has happened, and who captures them: the kernel is asked, on their node."""

from functools import partial

from tests.cluster.bed import Bed
from tests.cluster.checks import Check, at_once, equals
from tests.cluster.kubernetes_node import KubernetesNode
from tests.cluster.pods import PodName

SIDESTEP, RULES = "sidestep", "Istio's rules"
# $1 is an address: prints the namespace that has it
_FIND = 'for n in /run/netns/*; do ip -n "${n##*/}" -o addr | grep -qF " $1/" && echo "$n"; done; true'
# SO_NETNS_COOKIE is 71 (uapi/asm-generic/socket.h)
_COOKIE = "import socket, struct; print(struct.unpack('=Q', socket.socket().getsockopt(socket.SOL_SOCKET, 71, 8))[0])"


def captured_by(bed: Bed, pods: list[PodName], who: str) -> list[Check]:
    """By SIDESTEP or RULES, and not by the other."""
    return at_once(
        Check(f"{pod} is captured by {who} alone", equals(partial(_capturers, bed, pod), [who])) for pod in pods
    )


def _capturers(bed: Bed, pod: PodName) -> list[str]:
    name = bed.pods.get(pod)["spec"]["nodeName"]
    node = next(node for node in bed.cluster.nodes if node.name == name)
    netns = node.host.run(["bash", "-c", _FIND, "bash", bed.pods.ip(pod)]).strip()
    enter = ["nsenter", f"--net={netns}"]
    found = [SIDESTEP] if node.host.run([*enter, "python3", "-c", _COOKIE]).strip() in _enrolled(node) else []
    return found + [RULES] * ("ISTIO_INBOUND" in node.host.run([*enter, "iptables-save"]))


def _enrolled(node: KubernetesNode) -> list[str]:
    """The cookies of the namespaces that have a link of their own."""
    return (
        node.host.run(["bash", "-c", "shopt -s nullglob; cd /sys/fs/bpf; echo sidestep/*/netns/*"])
        .replace("/", " ")
        .split()
    )
