"""`sidestep pods`: the enrolled pods as plain values, read from the maps, with or without a running agent."""

from typing import Any

from bpf.acceleration import NodeLevel, level_of
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT, TOTALS, Cookie, Level, PodFlags, Quad, TallyEntry, TrafficEntry
from bpf.tables import Tables
from cni.enrolment.entries import Identity
from cni.enrolment.steered import Steering, steering_of
from cni.enrolment.strays import PodProcesses, processes_of
from installer.commands.names import NoSuchPod
from installer.commands.pods import enrolled_pods
from installer.commands.pods.ambient_mode import AmbientMode, ambient_mode
from installer.commands.pods.differences import Described, described, differences, misspelt_in, words_of
from installer.commands.pods.enrolled_pods import EnrolledPod
from installer.commands.pods.let_past import LetPast, let_past
from installer.commands.pods.namespace import NamespaceView, looked_into, looks_into
from installer.commands.pods.not_enrolled import left_out
from installer.commands.pods.pod_state import idle_programs, reason_of, state_of
from installer.commands.pods.policy_words import LISTENERS, is_default, proxy_of
from installer.commands.pods.proxy_state import proxy_state
from installer.commands.pods.refused import Refused, refused_pods
from installer.settings import Attachment, Node

# of a pod at level full: which programs they are can't be seen from outside
SHORT_READS = (
    "programs that stop at a short read may hang (nginx, tokio, netty's native epoll, HAProxy): "
    "docs/acceleration.md#what-an-application-notices-at-full"
)


def pods_documents(attachment: Attachment, node: Node) -> list[dict[str, Any]]:
    """A document for each mesh pod: those that are enrolled, then those with a sidecar or in ambient mode that are not.

    The latter have only name, addresses, state and reason. Raises NotAttached.
    """
    now, ambient = described(node), ambient_mode(node.cni_agent_run_dir)
    with Tables(attachment.pins.look_only()) as tables:
        level, idle = level_of(tables), idle_programs(attachment.pins)
        every = enrolled_pods.every(attachment.pins, tables)
        steering = steering_of(attachment.pins, tables, [pod.cookie for pod in every], node.proc)
        processes = processes_of(attachment.pins, [pod.cookie for pod in every], node.proc)
        found = [
            _document(pod, tables, level, inside, steering[pod.cookie], processes[pod.cookie], idle, ambient)
            | {"differs": differences(pod, now, inside, node), "misspelt": misspelt_in(now, pod.identity)}
            for pod, inside in looks_into(every, node.proc)
        ]
    others = left_out([pod.identity for pod in every], now, node)
    others += [each | {"address": None} for each in ambient.not_enrolled({pod.identity.uid for pod in every})]
    found.sort(key=lambda each: str(each["pod"]))
    return found + [_of_left_out(each) for each in others]


def pod_document(attachment: Attachment, node: Node, name: str) -> dict[str, Any]:
    """The document of one pod. Raises NoSuchPod, NotAttached."""
    with Tables(attachment.pins.look_only()) as tables:
        now = described(node)
        try:
            pod = enrolled_pods.find_pod(attachment.pins, tables, name)
        except NoSuchPod as error:
            raise NoSuchPod(why_not_enrolled(tables, now, node, name) or str(error)) from error
        steering = steering_of(attachment.pins, tables, [pod.cookie], node.proc)[pod.cookie]
        processes = processes_of(attachment.pins, [pod.cookie], node.proc)[pod.cookie]
        with looked_into(pod, node.proc) as inside:
            idle = idle_programs(attachment.pins)
            ambient = ambient_mode(node.cni_agent_run_dir) if PodFlags.AMBIENT in pod.flags else AmbientMode(False)
            document = _document(pod, tables, level_of(tables), inside, steering, processes, idle, ambient)
            about_pod = {"differs": differences(pod, now, inside, node), "misspelt": misspelt_in(now, pod.identity)}
            return document | about_pod


def others_of(attachment: Attachment, node: Node) -> tuple[LetPast, Refused]:
    """The pods that the agent knows to be not enrolled: let pass, or refused. Raises NotAttached."""
    with Tables(attachment.pins.look_only()) as tables:
        identities = [Identity.of(pod) for _, pod in tables.pods.every()]
    return let_past(identities, node), refused_pods(node.cni_agent_run_dir, map(str, identities))


def _of_left_out(left: dict[str, Any]) -> dict[str, Any]:
    namespace, _, name = str(left["pod"]).partition("/")
    address = [left["address"]] if left["address"] else []
    return {
        "pod": left["pod"],
        "namespace": namespace,
        "name": name,
        "state": left["state"],
        "reason": left["reason"],
        "addresses": address,
    }


def why_not_enrolled(tables: Tables, now: Described, node: Node, name: str) -> str:
    """Why a pod is not enrolled; "" if no pod of this name is known to be left out."""
    identities = [Identity.of(pod) for _, pod in tables.pods.every()]
    pending = ambient_mode(node.cni_agent_run_dir).not_enrolled({each.uid for each in identities})
    found = (
        f"{each['pod']} is not captured by sidestep ({each['state']}): {each['reason']}"
        for each in (*left_out(identities, now, node), *pending)
        if name in (each["pod"], _short(each))
    )
    return next(found, "") or refused_pods(node.cni_agent_run_dir).why(name) or let_past(identities, node).why(name)


def _short(left: dict[str, Any]) -> str:
    return str(left["pod"]).partition("/")[2]


def _document(
    pod: EnrolledPod,
    tables: Tables,
    node: NodeLevel,
    inside: NamespaceView | None,
    steering: Steering,
    processes: PodProcesses,
    idle: str,
    ambient: AmbientMode,
) -> dict[str, Any]:
    identity, proxy = pod.identity, proxy_state(pod, inside)
    state = ambient.state_of(identity.uid, state_of(pod.flags, steering, processes, proxy))
    return {
        "pod": str(identity),
        "namespace": identity.namespace,
        "name": identity.name,
        "state": state,
        "reason": reason_of(state, steering, processes, idle) or ambient.reason_of(identity.uid),
        "uid": identity.uid,
        "netns_cookie": pod.cookie,
        "container_id": identity.container_id,
        "network": identity.network,
        "interface": identity.ifname,
        "is_adopted": identity.is_adopted,
        "is_alive": steering in (Steering.STEERED, Steering.NOT_STEERED),
        "steering": str(steering),
        "proxy": proxy.document(),
        "processes": processes.document(),
        "addresses": [str(ip) for ip in sorted(pod.addresses, key=lambda ip: (ip.version, int(ip)))],
        "captures_ipv6": pod.is_ipv6_captured,
        "policy": _policy(pod),
        "listeners": _listeners(pod, inside),
        "connections": _connections(tables.tallies.get(Cookie(pod.cookie)) or TallyEntry()),
        "lost_handovers": (tables.lost_handovers.get(Cookie(pod.cookie)) or Quad()).quad,
        "acceleration": _acceleration(pod, node, tables.traffic.get(Cookie(pod.cookie)) or TrafficEntry()),
    }


def _policy(pod: EnrolledPod) -> dict[str, Any]:
    """The annotations and proxy fields that would give the policy. Ids are those that the node sees."""
    words, of_proxy = words_of(pod), proxy_of(pod.policy).keys()
    told = {
        "annotations": {name: value for name, value in words.items() if name not in of_proxy},
        "proxy": {name: value for name, value in words.items() if name in of_proxy},
    }
    return told | {"defaults": [name for name, value in words.items() if is_default(name, value)]}


def _listeners(pod: EnrolledPod, inside: NamespaceView | None) -> dict[str, Any]:
    """How many sockets the programs steer to, and who listens in the namespace (None if it was not found)."""
    ports = (OUTBOUND_PORT, INBOUND_PORT, LISTENERS["dns"][1])
    told: dict[str, Any] = {
        "steered_to": pod.inbound_listeners,
        "listening": {str(port): inside.listeners(port) for port in ports} if inside else None,
    }
    if PodFlags.EARLY_OUTBOUND in pod.flags:
        told["proxy_has_started"] = pod.has_started
    if PodFlags.LATE_OUTBOUND in pod.flags:
        told["late_outbound"] = _late(pod, inside)
    if PodFlags.STRICT in pod.flags:
        told["proxy_cgroup"] = pod.proxy_cgroup
    return told


def _late(pod: EnrolledPod, inside: NamespaceView | None) -> str:
    """How it is with late outbound: whether it has begun, or what is missing."""
    if PodFlags.DELETED not in pod.flags:
        return "begins when the Pod is being deleted and its proxy listens on 15001 no more"
    if not pod.has_started:
        return "does not begin: the Pod is being deleted, and its proxy has never listened"
    if inside is None:
        return "not known: who listens on 15001 can't be looked at"
    if inside.is_heard(OUTBOUND_PORT):
        return "begins when its proxy listens on 15001 no more: the Pod is being deleted"
    return "goes on: everything passes"


def _connections(tally: TallyEntry) -> dict[str, dict[str, int]]:
    """The counts of connections by direction and verdict."""
    told: dict[str, dict[str, int]] = {}
    for (direction, verdict), count in zip(TOTALS, tally.connections, strict=True):
        told.setdefault(direction, {})[verdict] = count
    return told


def _acceleration(pod: EnrolledPod, node: NodeLevel, traffic: TrafficEntry) -> dict[str, Any]:
    own = Level(pod.entry.acceleration)
    level = min(own, node.level)
    sums = {name: getattr(traffic, name) for name, *_ in TrafficEntry._fields_}
    warning = SHORT_READS if level is Level.FULL else ""
    return {"level": str(level), "allowed": str(own), "node": str(node.level), **sums, "warning": warning}
