"""Compares enrolled pods with what their Pods ask for now. Reads the Pods from where the agent reads them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bpf.errors import SidestepError
from bpf.layout import PodFlags
from cni.enrolment.ambient import ambient_policy_of_flags
from cni.enrolment.entries import Identity
from cni.errors import InvalidAnnotation
from cni.policy import annotations as istio
from cni.policy.ambient_annotations import ambient_policy_of
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.annotations import (
    DENY_INBOUND_PORTS,
    DENY_OUTBOUND_PORTS,
    DUAL_STACK,
    LIVE_POLICY,
    CapturePolicy,
    is_live,
    policy_of,
)
from cni.policy.membership import skip_pod
from cni.policy.pod import Pod
from cni.policy.spelling import misspelt
from installer.commands.pods.enrolled_pods import EnrolledPod
from installer.commands.pods.namespace import NamespaceView
from installer.commands.pods.policy_words import ambient_words, annotations_of, as_kept, proxy_of
from installer.pods.api import Api
from installer.pods.directory import PodDirectory
from installer.settings import Node

# what is done about a change, by whether the running pod follows it
FOLLOWED, ONLY_NEW = "followed within a second", "new pods only"
_WHY_ONLY_NEW = "a change since the pod was made applies to new pods only, except for denied ports"
_WHY_ONLY_NEW_LIVE = "what this pod's proxy has too, or is fixed at its start, applies to new pods only"
_AMBIENT_ONLY_NEW = "a change since the pod came into ambient mode applies when it comes in anew"
_NOT_YET = "what is followed has not been yet; if it stays so, the agent is down, or its log says why"
_DENIALS = (DENY_OUTBOUND_PORTS, DENY_INBOUND_PORTS)
_MIRROR = "kubernetes.io/config.mirror"


@dataclass(frozen=True)
class Described:
    """The Pods of this node as they are now. If they cannot be read: None, and why."""

    pods: tuple[Pod, ...] | None
    problem: str = ""

    def pod(self, identity: Identity) -> Pod | None:
        """The Pod that was enrolled. If both sides have a UID, it must match: a later Pod may have the same name."""
        for pod in self.pods or ():
            uids = (None, identity.uid, "") if identity.uid else (pod.uid,)
            if (pod.namespace, pod.name) == (identity.namespace, identity.name) and (
                pod.uid in uids or pod.annotations.get(_MIRROR) == identity.uid
            ):
                return pod
        return None


def described(node: Node) -> Described:
    """Read the Pods once, from the source that the settings name."""
    if node.pods is not None:
        found = PodDirectory(node.pods).every()
        return Described(None, f"{node.pods} can't be read") if found is None else Described(tuple(found))
    if not node.kubernetes_node_name:
        return Described(None, "nowhere to get Pods from; give --pods DIR or --kubernetes-node-name NAME")
    try:
        api = Api.of(node, lambda verb, status: None)
        try:
            return Described(tuple(api.list_pods(node.kubernetes_node_name, "0")[0]))
        finally:
            api.close()
    except SidestepError as error:
        return Described(None, str(error))


def differences(pod: EnrolledPod, now: Described, inside: NamespaceView | None, node: Node) -> dict[str, Any]:
    """The part that is printed: annotations with other values now, and what would become of a new pod."""
    if now.pods is None:
        return {"known": False, "reason": f"not compared with the Pod: {now.problem}", "changes": []}
    described_pod = now.pod(pod.identity)
    if described_pod is None:
        return {"known": False, "reason": "its Pod no longer exists", "changes": []}
    if ambient := ambient_of(pod):
        return _ambient_differences(ambient, described_pod)
    if reason := skip_pod(described_pod, node.pod_namespace, node.exclude_namespaces):
        return {"known": True, "reason": f"a new pod would not be captured: {reason}", "changes": []}
    try:
        # the node's defaults, which nobody knows here
        wanted = policy_of(described_pod, pod.policy.uncaptured, pod.policy.live)
    except InvalidAnnotation as error:
        stays = "; until the value makes sense, this pod keeps its old policy" if _is_followed(pod, error) else ""
        return {"known": True, "reason": f"a new pod would be refused: {error}{stays}", "changes": []}
    kept, asked = words_of(pod), _words(pod, _as_enrolled(pod, wanted, inside))
    followed = _followed_by(pod, described_pod)
    changes = [
        {
            "name": name,
            "enrolled": kept[name],
            "now": asked[name],
            "applies": FOLLOWED if name in followed else ONLY_NEW,
        }
        for name in kept
        if kept[name] != asked[name]
    ]
    why = {FOLLOWED: _NOT_YET, ONLY_NEW: _WHY_ONLY_NEW_LIVE if LIVE_POLICY in followed else _WHY_ONLY_NEW}
    reasons = [why[each] for each in dict.fromkeys(change["applies"] for change in changes)]
    return {"known": True, "reason": "; ".join(reasons), "changes": changes}


def ambient_of(pod: EnrolledPod) -> AmbientPolicy | None:
    """The policy of a pod in ambient mode; None if it is not in it."""
    return ambient_policy_of_flags(pod.flags) if PodFlags.AMBIENT in pod.flags else None


def _ambient_differences(kept: AmbientPolicy, now: Pod) -> dict[str, Any]:
    """The same for a pod in ambient mode. Whether it is in it is not compared: labels of its namespace decide too."""
    try:
        asked = ambient_words(ambient_policy_of(now, kept))
    except InvalidAnnotation as error:
        return {"known": True, "reason": f"a new pod would be refused: {error}", "changes": []}
    changes = [
        {"name": name, "enrolled": value, "now": asked[name], "applies": ONLY_NEW}
        for name, value in ambient_words(kept).items()
        if value != asked[name]
    ]
    return {"known": True, "reason": _AMBIENT_ONLY_NEW if changes else "", "changes": changes}


def _followed_by(pod: EnrolledPod, now: Pod) -> tuple[str, ...]:
    """The annotations whose changes the running pod follows. Raises InvalidAnnotation."""
    return (*_DENIALS, *istio.FOLLOWED) if is_live(now, pod.policy.live) else _DENIALS


def _is_followed(pod: EnrolledPod, refused: InvalidAnnotation) -> bool:
    """Whether the pod would follow the annotation if its value were not refused."""
    return refused.annotation in _DENIALS or (pod.policy.live and refused.annotation in istio.FOLLOWED)


def misspelt_in(now: Described, identity: Identity) -> list[str]:
    """What there is to say of misspelt annotations of an enrolled pod; nothing if its Pod is not known."""
    found = now.pod(identity)
    return list(map(str, misspelt(found.annotations))) if found else []


def is_ending(now: Described, identity: Identity) -> bool:
    """Whether somebody has deleted an enrolled pod, so that its containers end; False if its Pod is not known."""
    found = now.pod(identity)
    return found is not None and found.metadata.deletion_timestamp is not None


def words_of(pod: EnrolledPod) -> dict[str, str]:
    """The pod's policy in Istio's words: annotations, then the fields of its proxy's container."""
    if ambient := ambient_of(pod):
        return ambient_words(ambient)
    return _words(pod, pod.policy)


def is_different(found: dict[str, Any]) -> bool:
    """Whether a new pod would be enrolled differently, or not at all."""
    return bool(found["known"] and found["reason"])


def _words(pod: EnrolledPod, policy: CapturePolicy) -> dict[str, str]:
    told = annotations_of(policy) | proxy_of(policy)
    if not has_both_families(pod):
        del told[DUAL_STACK]  # with one family it makes no difference
    return told


def has_both_families(pod: EnrolledPod) -> bool:
    """Whether the pod has routable addresses of both IPv4 and IPv6."""
    return all(any(address.bytes) for address in (pod.entry.source4, pod.entry.source6))


def _as_enrolled(pod: EnrolledPod, wanted: CapturePolicy, inside: NamespaceView | None) -> CapturePolicy:
    """A policy as the maps would have it if this pod were made again."""
    kept = as_kept(wanted)
    uid, gid = inside.outside_ids(kept.proxy_uid, kept.proxy_gid) if inside else (kept.proxy_uid, kept.proxy_gid)
    changed: dict[str, object] = {"proxy_uid": uid, "proxy_gid": gid}
    if not has_both_families(pod):
        changed["dual_stack"] = PodFlags.IPV6 in pod.flags
    return kept.model_copy(update=changed)


def uncompared(rows: Iterable[dict[str, Any]]) -> str:
    """Why no pod was compared, if one reason holds for all; else ""."""
    reasons = {row["differs"]["reason"] for row in rows if not row["differs"]["known"]}
    return reasons.pop() if len(reasons) == 1 else ""
