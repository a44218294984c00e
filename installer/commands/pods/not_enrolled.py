"""The running pods of this node that have a sidecar and are not enrolled: who captures each of them, if anybody."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from cni.enrolment.bystanders import RUNNING_WITH_RULES, bystanders, key_of, under_istios_rules
from cni.enrolment.entries import Identity
from cni.policy.membership import INIT_CONTAINER
from installer.commands.pods.differences import Described
from installer.settings import Node

_NOT_YET_ENROLLED = "it should be enrolled; the agent's log and the Pod's Events say why it is not"


class Outside(StrEnum):
    """The states of a pod that is not enrolled, by the words that every command uses."""

    ISTIO = "Istio's rules"
    NOT_CAPTURED = "not captured"
    LEFT_ALONE = "left alone"  # by a setting, or because the Pod asks for it
    UNKNOWN = "unknown"


def left_out(identities: Iterable[Identity], now: Described, node: Node) -> list[dict[str, Any]]:
    """A document for each of these pods. `is_awaited` says that the agent should enrol it."""
    enrolled = {key_of(each.uid, each.namespace, each.name) for each in identities}
    found = list(bystanders(now.pods or (), enrolled, node.pod_namespace, node.exclude_namespaces))
    doubtful = [each.pod for each in found if not each.reason or INIT_CONTAINER in each.reason]
    try:
        ruled = under_istios_rules(doubtful, node.proc)
    except OSError:
        ruled = {}
    documents = []
    for pod, reason in found:
        is_ruled = ruled.get(key_of(pod.uid, pod.namespace, pod.name))
        if is_ruled:
            state, why = Outside.ISTIO, reason or RUNNING_WITH_RULES
        elif not reason:
            state, why = Outside.NOT_CAPTURED, _NOT_YET_ENROLLED
        elif pod not in doubtful:
            state, why = Outside.LEFT_ALONE, reason
        else:
            state, why = Outside.UNKNOWN if is_ruled is None else Outside.NOT_CAPTURED, reason
        documents.append(
            {
                "pod": f"{pod.namespace}/{pod.name}",
                "address": pod.status.pod_ip or None,
                "state": str(state),
                "is_awaited": not reason,
                "reason": why,
            }
        )
    return documents
