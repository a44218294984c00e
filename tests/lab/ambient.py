"""An ambient node without its kernel half: an API server, namespaces of pods, the agent's members, and ztunnels."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bpf.errors import SidestepError
from cni.enrolment.entries import Identity
from cni.enrolment.whose_netns import Inhabited
from cni.netns.processes import Crowd
from cni.netns.sandbox import own_cookie, visit
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.enablement import Enablement
from cni.policy.pod import Pod
from installer.ambient.members import Members
from installer.ambient.node import Node
from installer.pods.namespaces import ClusterNamespaces
from installer.pods.pod_events import ClusterEvents
from tests.lab.cluster import NODE, World
from tests.lab.netns_fds import Namespace
from tests.lab.waiting import wait_until

MODE = "istio.io/dataplane-mode"
AMBIENT = {MODE: "ambient"}
REDIRECTION = "ambient.istio.io/redirection"


class Table:
    """What stands for the kernel's maps: which namespaces are captured, for which pod."""

    def __init__(self) -> None:
        self.rows: dict[int, Identity] = {}
        self.policies: dict[int, AmbientPolicy] = {}
        self.refusal = ""  # why nothing can be captured

    def admit(
        self, pod: Pod, identify: Callable[[Identity | None], Identity], policy: AmbientPolicy, netns: int
    ) -> int:
        if self.refusal:
            raise SidestepError(self.refusal)
        cookie = visit(netns, lambda _: own_cookie())
        self.rows[cookie] = identify(self.rows.get(cookie))
        self.policies[cookie] = policy
        return cookie

    def leave(self, cookie: int) -> None:
        self.rows.pop(cookie, None)

    def accepted(self, cookie: int) -> None:
        assert cookie in self.rows

    def whose(self, cookie: int) -> str | None:
        found = self.rows.get(cookie)
        return found.uid if found else None

    def enrolled(self) -> dict[int, str]:
        return {cookie: identity.uid for cookie, identity in list(self.rows.items())}


def identity_of(pod: Pod) -> Identity:
    """As an ADD would enrol it."""
    return Identity(pod.uid or "", pod.name, pod.namespace, "container", "lab", "eth0")


class AmbientNode:
    """A node in which pods run where `sandboxes` says: UID → namespace."""

    def __init__(self, world: World, socket: Path) -> None:
        self.world, self.socket = world, socket
        self.table = Table()
        self.sandboxes: dict[str, Namespace] = {}
        self.walks = 0  # looks for namespaces
        self.namespaces = ClusterNamespaces(world.api)
        self.events = ClusterEvents(world.api, NODE)
        world.server.put_namespace("default")
        self.members = self._members()

    def _members(self) -> Members:
        node = Node(
            pods=self.world.pods,
            namespaces=self.namespaces,
            enablement=Enablement(excluded=("kube-system",)),
            capture=self.table,
            inhabited=self._inhabited,
            find_netns=self._find_netns,
            identity=lambda each: identity_of(each.pod),
            recognise=lambda _: None,
            annotate=self.world.api.annotate_pod,
            events=self.events,
            policy=AmbientPolicy(dns_capture=True),
        )
        return Members(node, self.socket)

    def _inhabited(self, pods: Collection[Pod]) -> Iterator[Inhabited]:
        if not pods:
            return
        self.walks += 1
        for pod in pods:
            if found := self.sandboxes.get(pod.uid or ""):
                yield Inhabited(pod, Crowd(0), found.fd)

    @contextmanager
    def _find_netns(self, cookies: Collection[int]) -> Iterator[Iterator[tuple[int, int]]]:
        fds = {each.cookie: each.fd for each in self.sandboxes.values()}
        yield ((cookie, fds[cookie]) for cookie in cookies if cookie in fds)

    @contextmanager
    def agent(self, seconds: float = 3600.0) -> Iterator[Members]:
        """An agent's life: it knows of earlier ones what the table has."""
        self.members = self._members()
        with ExitStack() as up:
            if not self.world.pods.is_synced:
                self.world.pods.subscribe(lambda before, after: self.members.changed(before, after))
                self.namespaces.subscribe(lambda *change: self.members.namespace_changed(*change))
                for part in (self.namespaces, self.events):
                    self.world.running.enter_context(part.running())
                self.world.running.enter_context(self.world.pods.running())
                assert self.world.pods.wait_synced(5) and self.namespaces.wait_synced(5)
            up.enter_context(self.members.running(seconds))
            yield self.members

    def is_at_rest(self) -> bool:
        """Whether the members have looked for no namespaces for a moment."""
        before = self.walks
        time.sleep(0.3)
        return self.walks == before

    def pod(self, name: str, labels: dict[str, str] | None = None, phase: str = "Running", **metadata: Any) -> Pod:
        """Create or change a Pod in the API. It has an address if it runs."""
        known = self.world.server.pods.get(("default", name))
        uid = {"uid": known["metadata"]["uid"], "annotations": self.annotations(name)} if known else {}
        made = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": labels or {}, **uid, **metadata},
            "spec": {"nodeName": NODE, "containers": [{"name": "app"}], "serviceAccountName": "cart"},
            "status": {"phase": phase, **({"podIP": "10.0.0.1"} if phase == "Running" else {})},
        }
        return Pod.model_validate(self.world.server.put(made))

    def annotations(self, name: str) -> dict[str, str]:
        found: dict[str, str] = self.world.server.pods["default", name]["metadata"].get("annotations") or {}
        return found

    def redirection(self, name: str) -> str | None:
        """What the Pod's annotation says."""
        return self.annotations(name).get(REDIRECTION)

    def wait_redirection(self, name: str, state: str | None, seconds: float = 10) -> None:
        wait_until(
            lambda: self.redirection(name) == state, f"{name} to be {state}, not {self.redirection(name)}", seconds
        )

    def reasons(self, name: str) -> list[str]:
        """The reasons of the Pod's Events."""
        return [each["reason"] for each in self.world.server.events if each["involvedObject"]["name"] == name]
