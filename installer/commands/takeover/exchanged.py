"""Asks the agent to exchange what captures pods: which pods, and what became of each."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bpf.errors import SidestepError
from cni.enrolment.bystanders import key_of, under_istios_rules
from cni.policy.membership import skip_pod
from cni.policy.pod import Pod
from cni.protocol import SOCKET_NAME, Order
from installer.commands.agent_socket import ask_about, ask_agent
from installer.commands.names import NoSuchPod
from installer.commands.pods.differences import described
from installer.settings import Node

Way = Literal["TAKE_OVER", "GIVE_BACK"]
_AT_ONCE = 8  # as many as the agent works at
_SECONDS = 120.0  # for one pod; it takes a few
# of Kubernetes, as far as it matters here: an optional namespace and a name
_NAME = re.compile(r"(?:[\w.-]{1,63}/)?[\w.-]{1,253}")


class PodName(NamedTuple):
    """A pod by its namespace and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def named_pods(node: Node, names: Iterable[str], namespace: str) -> list[PodName]:
    """The pods of these names; one without a namespace is looked for among the node's Pods. Raises NoSuchPod."""
    pods, found = _Pods(node), []
    for given in names:
        if not _NAME.fullmatch(given):
            raise NoSuchPod(f"{given!r} is no pod's name; give NAME or NAMESPACE/NAME")
        before, _, name = given.rpartition("/")
        wanted = before or namespace
        found.append(PodName(wanted, name) if wanted else pods.called(name))
    return found


def every_pod(node: Node, way: Way, namespace: str) -> list[PodName]:
    """The pods that are captured by Istio's rules now, or were taken over. Raises SidestepError, OSError."""
    if way == "GIVE_BACK":
        told = ask_about(node.cni_agent_run_dir, "WHO_WAS_TAKEN_OVER")
        if told.unknown:
            raise SidestepError(f"which pods were taken over is not known: {told.unknown}")
        found = [PodName(*each.split("/", 1)) for each in told.rows]
    else:
        outside = node.pod_namespace, node.exclude_namespaces
        pods = [each for each in _Pods(node).every() if each.is_running and not skip_pod(each, *outside)]
        ruled = under_istios_rules(pods, node.proc)
        found = [
            PodName(pod.namespace, pod.name) for pod in pods if ruled.get(key_of(pod.uid, pod.namespace, pod.name))
        ]
    return sorted(each for each in found if namespace in ("", each.namespace))


def exchanges(run_dir: Path, way: Way, pods: Iterable[PodName]) -> list[dict[str, Any]]:
    """Have the agent exchange each pod. A document says what was done, or what the problem is."""
    with ThreadPoolExecutor(_AT_ONCE) as workers:
        return list(workers.map(partial(_exchange, run_dir, way), pods))


def exchanged_text(documents: list[dict[str, Any]]) -> str:
    """A line for each pod that was exchanged."""
    lines = [f"{each['pod']}: {each['done']}" for each in documents if each["done"]]
    return "".join(f"{line}\n" for line in lines or ([] if documents else ["no pods to exchange"]))


def _exchange(run_dir: Path, way: Way, pod: PodName) -> dict[str, Any]:
    order = Order(command=way, namespace=pod.namespace, name=pod.name).model_dump()
    asked = ask_agent(run_dir, order, _SECONDS)
    problem = asked.fault
    if asked.pid is None and asked.fault:
        problem = f"no agent answers at {run_dir / SOCKET_NAME}; nothing is changed"
    elif asked.fault and "msg" not in asked.output:  # it has not said what it has done
        problem = f"unknown: {asked.fault}; look with `sidestep pods {pod}`, then repeat"
    return {"pod": str(pod), "done": "" if problem else asked.output["done"], "problem": problem}


class _Pods:
    """The node's Pods, read when they are needed."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def every(self) -> tuple[Pod, ...]:
        now = described(self._node)
        if now.pods is None:
            raise SidestepError(f"the Pods of this node are not known: {now.problem}")
        return now.pods

    def called(self, name: str) -> PodName:
        found = [PodName(each.namespace, each.name) for each in self.every() if each.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise NoSuchPod(f"several pods are called {name}: {', '.join(map(str, found))}; give one of these")
        raise NoSuchPod(f"no pod on this node is called {name}; give NAMESPACE/NAME")
