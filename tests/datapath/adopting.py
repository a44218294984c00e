"""Pods that run without having been enrolled, and what adopts them; no agent, no API server."""

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from cni.enrolment.admission import Admission
from cni.enrolment.adoption import Adopted, Adoption
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity
from cni.enrolment.follow import Follower
from cni.enrolment.hearing import Hearing
from cni.enrolment.strict_proxies import StrictProxies
from cni.enrolment.whereabouts import Whereabouts
from cni.errors import PodNotFound
from cni.policy.annotations import policy_of
from cni.policy.pod import NoEvents, Pod
from cni.verbs import Verbs
from installer.agent.places import Places
from installer.agent.reconcile import NodeTables, Reconciler
from installer.settings import Attachment, Node
from tests.datapath.wires import PROXY, Kernel, Namespace, Wire

STATUS = "sidecar.istio.io/status"
NOBODYS = "203.0.113.9"  # the address in a Pod's status unless a test gives another: nobody whom its agent sees has it

WAYS = ["iterator", "processes"]  # in which listeners are found

# binds at once, listens when told to
LATE = """
import socket, sys
family = socket.AF_INET6 if sys.argv[1] == "6" else socket.AF_INET
s = socket.socket(family, socket.SOCK_STREAM)
s.bind(("::" if sys.argv[1] == "6" else "0.0.0.0", int(sys.argv[2])))
print("ready", flush=True)
sys.stdin.readline()
s.listen(8)
print("listening", flush=True)
while True:
    s.accept()[0].sendall(b'{"who": "late"}\\n')
"""


@dataclass
class Listed:
    """A PodSource with just these."""

    pods: list[Pod] = field(default_factory=list)

    def find(self, namespace: str, name: str, uid: str | None) -> Pod:
        for pod in self.pods:
            if (pod.namespace, pod.name) == (namespace, name):
                return pod
        raise PodNotFound(f"no {namespace}/{name}")

    def every(self) -> list[Pod] | None:
        return list(self.pods)


@dataclass
class Told(NoEvents):
    """Events, by reason."""

    events: list[tuple[str, str]] = field(default_factory=list)

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        self.events.append((reason, message))

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        self.events.append((reason, message))


@dataclass
class Running:
    """A wire's pod as its runtime has it: a sandbox's process, and containers in cgroups of their own."""

    wire: Wire
    uid: str
    sandbox: str
    namespaces: dict[str, Namespace] = field(default_factory=dict)
    env: tuple[dict[str, str], ...] = ()  # more of the proxy's

    def container(self, container_id: str) -> Namespace:
        """Where processes of a container run."""
        if container_id not in self.namespaces:
            cgroup = self.wire.kernel.cgroup / f"cri-containerd-{container_id}.scope"
            cgroup.mkdir()
            self.namespaces[container_id] = replace(self.wire.pod, cgroup=cgroup, started=[])
        return self.namespaces[container_id]

    def pod(
        self,
        *containers: str,
        uid: str | None = "",
        ip: object = NOBODYS,
        **annotations: str,
    ) -> Pod:
        """The Pod as the API server has it, with the containers that its status knows."""
        statuses = [{"name": "istio-proxy", "containerID": f"containerd://{each}"} for each in containers]
        metadata = {"name": "pod", "namespace": "default", "annotations": {STATUS: "{}", **annotations}}
        proxy = {"name": "istio-proxy", "env": [{"name": "ISTIO_DUAL_STACK", "value": "true"}, *self.env]}
        return Pod.model_validate(
            {
                "metadata": metadata | {"uid": self.uid if uid == "" else uid},
                "spec": {"containers": [proxy]},
                "status": {"phase": "Running", "podIP": str(ip), "containerStatuses": statuses},
            }
        )

    def serve(self, name: str, *ports: str, uid: int = PROXY, gid: int | None = None) -> subprocess.Popen[str]:
        """A stand-in in the proxy's container."""
        return self.container(self.proxy).serve(name, *ports, uid=uid, gid=gid)

    @property
    def proxy(self) -> str:
        """The proxy's container."""
        return self.sandbox[::-1]

    def stop(self) -> None:
        for namespace in self.namespaces.values():
            namespace.stop()
            assert namespace.cgroup is not None
            namespace.cgroup.rmdir()
        self.namespaces.clear()


@contextmanager
def running(wire: Wire) -> Iterator[Running]:
    """Start the sandbox's process, then one in the proxy's container; everything ends afterwards."""
    made = Running(wire, secrets.token_hex(8), secrets.token_hex(32))
    try:
        for container in (made.sandbox, made.proxy):
            made.container(container).start(["/bin/sh", "-c", "echo ready; exec sleep 1000"], 0)
        yield made
    finally:
        made.stop()


@dataclass
class Parts:
    """What an agent is made of, as far as it is about pods that run."""

    kernel: Kernel
    enrolments: Enrolments
    follower: Follower
    admission: Admission
    proxies: StrictProxies
    hearing: Hearing
    adoption: Adoption
    pods: Listed
    events: Told
    verbs: Verbs
    reconciler: Reconciler

    def adopt(self, pod: Pod) -> Adopted | None:
        """What became of one pod."""
        return next(self.adoption.adopt([pod]), None)


@contextmanager
def parts(kernel: Kernel, way: str = "iterator") -> Iterator[Parts]:
    """A second reader of the kernel's maps: make one per test, as an agent that starts.

    It finds listeners by one of the `WAYS`.
    """
    proc = kernel.procfs.path
    pods, events = Listed(), Told()
    enrolments = Enrolments(kernel.pins, kernel.tables)
    proxies = StrictProxies(pods, kernel.tables, lambda: [kernel.cgroup], lambda cookie: reconciler.learned(cookie))
    follower = Follower(enrolments, proxies, proc)
    admission = Admission(enrolments, follower, proc)
    hearing = Hearing(enrolments, kernel.pins, proc)
    assert not hearing.needs_processes
    if way == "processes":
        hearing.close()  # as where the kernel does not take the iterator
    adoption = Adoption(admission, hearing, proc)
    places = Places(Attachment(kernel.pins.bpffs, kernel.cgroup))
    reconciler = Reconciler(
        place=NodeTables(kernel.pins, places, kernel.tables),
        node=Node(proc=proc, exclude_namespaces=()),
        pods=pods,
        enrolments=enrolments,
        follower=follower,
        adoption=adoption,
        events=events,
        observe=lambda *_: None,
    )
    whereabouts = Whereabouts.at_start(kernel.pins, places.cover)
    verbs = Verbs(pods, enrolments, follower, admission, whereabouts, events, call_for_help=reconciler.wake)
    try:
        yield Parts(
            kernel, enrolments, follower, admission, proxies, hearing, adoption, pods, events, verbs, reconciler
        )
    finally:
        for cookie in enrolments.cookies():
            enrolments.remove(cookie)
        follower._watch.close()
        hearing.close()


def enrol_by_cni(parts: Parts, wire: Wire, pod: Pod, container: str = "sandbox") -> None:
    """As an ADD."""
    identity = Identity(pod.uid or "", pod.name, pod.namespace, container, "net", "eth0")
    with wire.pod.path.open() as netns:
        parts.admission.admit_as(identity, policy_of(pod), netns.fileno())
