"""The CNI verbs, one function each: what they decide is Istio's, what they write goes through Enrolments."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from cni.enrolment.admission import Admission
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity
from cni.enrolment.follow import Follower
from cni.errors import (
    CheckFailed,
    CniError,
    Code,
    InvalidAnnotation,
    InvalidRequest,
    NotCaptured,
    SandboxInvalid,
)
from cni.netns.sandbox import own_cookie, require_netns, visit
from cni.policy.annotations import INVALID_DROP, CapturePolicy, policy_of
from cni.policy.membership import skip_reason, skip_unseen
from cni.policy.pod import NoEvents, Pod, PodEvents, PodSource
from cni.protocol import PodArgs, Request, pod_args

log = structlog.get_logger("cni")
Output = dict[str, Any] | None
# what becomes of the pod of an ADD
RESULTS = ENROLLED, NOT_IN_MESH, FAILED = "enrolled", "not_in_mesh", "failed"


def _unobserved(result: str) -> None:
    """Of verbs that nobody counts."""


def _nobody() -> None:
    pass


@dataclass(frozen=True)
class Verbs:
    """ADD, DEL, CHECK, STATUS and GC over one node's pods. Handlers may run at the same time in many threads."""

    pods: PodSource
    enrolments: Enrolments
    follower: Follower
    admission: Admission
    events: PodEvents = field(default_factory=NoEvents)
    observe: Callable[[str], None] = _unobserved  # told one of the RESULTS after each ADD
    call_for_help: Callable[[], None] = _nobody  # called when the programs are found detached

    def run(self, request: Request, netns_fd: int | None) -> Output:
        """Answer a request; what is returned the shim prints. Raises CniError."""
        handlers: dict[str, Callable[[Request, int | None], Output]] = {
            "ADD": self.add,
            "DEL": self.delete,
            "CHECK": self.check,
            "STATUS": self.status,
            "GC": self.collect,
        }
        return handlers[request.command](request, netns_fd)

    def add(self, request: Request, netns_fd: int | None) -> Output:
        """Enrol the pod if it is a mesh pod; the previous result goes through unchanged either way."""
        result = FAILED
        try:
            result = self._add(request, netns_fd)
        finally:
            self.observe(result)
        return request.result

    def _add(self, request: Request, netns_fd: int | None) -> str:
        pod = self._mesh_pod(pod_args(request.args), request)
        if pod is None:
            return NOT_IN_MESH
        policy, netns = self._policy(pod), _netns(netns_fd)
        known = self._enrolled(netns)
        entries, cookie = self.admission.admit(_identity(request, pod, known), policy, netns)
        self._require_captured(cookie, entries.identity, known)
        log.info(
            "pod.enrolled",
            pod=str(entries.identity),
            container=request.container_id,
            netns_cookie=cookie,
            addresses=" ".join(str(each.ip) for each in entries.sandbox.addresses),
        )
        if policy.invalid_drop:
            log.info(
                "setting.meaningless", pod=str(entries.identity), setting=INVALID_DROP, reason="no conntrack is used"
            )
        return ENROLLED

    def _policy(self, pod: Pod) -> CapturePolicy:
        """What the Pod's annotations ask for; its owner is told when they cannot be honoured."""
        try:
            return policy_of(pod)
        except InvalidAnnotation as error:
            self.events.warning(pod, "CaptureRefused", str(error))
            raise

    def _require_captured(self, cookie: int, identity: Identity, before: Identity | None) -> None:
        """Entries alone capture nothing. Raises NotCaptured, having taken back an enrolment that is new."""
        if self.enrolments.is_captured(cookie):
            return
        if before is None:
            self.follower.forget(cookie)
            self.enrolments.remove(cookie)
        self.call_for_help()
        raise NotCaptured(
            f"{identity} would run uncaptured: sidestep's programs are not attached to the pods' cgroup on this node; "
            "the agent is attaching them again, so try again"
        )

    def delete(self, request: Request, netns_fd: int | None) -> Output:
        """Forget what this attachment enrolled; unknown ones are fine, and the namespace is not needed."""
        for cookie in self.enrolments.of_attachment(request.container_id, request.ifname, _cookie(netns_fd)):
            self.follower.forget(cookie)
            self.enrolments.remove(cookie)
            log.info("pod.removed", container=request.container_id, netns_cookie=cookie)
        return None

    def check(self, request: Request, netns_fd: int | None) -> Output:
        """Compare the maps with what the Pod asks for now. Raises CheckFailed saying what differs."""
        pod = self._mesh_pod(pod_args(request.args), request)
        netns = _netns(netns_fd)
        if pod is None:
            return None
        known = self._enrolled(netns)
        identity = known if known and known.is_adopted else _identity(request, pod, known)
        entries, cookie = self.admission.wanted(identity, policy_of(pod), netns)
        if found := self.enrolments.differences(cookie, entries):
            raise CheckFailed(
                f"{entries.identity} is not registered as its Pod asks: {found[0]}",
                details="; ".join(found[1:]),
            )
        return None

    def status(self, request: Request, netns_fd: int | None) -> Output:
        """Ready to enrol: answering at all says that the agent runs, the pins say that the programs are attached."""
        if not self.enrolments.is_attached():
            raise CniError(
                "sidestep's programs are not attached on this node; restart the agent", code=Code.NOT_AVAILABLE
            )
        return None

    def collect(self, request: Request, netns_fd: int | None) -> Output:
        """Forget this network's attachments that the runtime no longer lists, and all that dead namespaces left."""
        if request.config.valid_attachments is None:
            raise InvalidRequest('GC needs "cni.dev/valid-attachments" in the configuration')
        valid = {(item.get("containerID"), item.get("ifname")) for item in request.config.valid_attachments}
        for cookie, identity in self.enrolments.of_network(request.config.name).items():
            if (identity.container_id, identity.ifname) not in valid:
                self.follower.forget(cookie)
                self.enrolments.remove(cookie)
                log.info("pod.collected", pod=str(identity), container=identity.container_id)
        for identity in self.follower.sweep().gone:
            log.info("pod.reclaimed", pod=str(identity), container=identity.container_id)
        return None

    def _enrolled(self, netns: int) -> Identity | None:
        """Who is enrolled for a namespace so far."""
        entry = self.enrolments.entry(visit(netns, lambda _: own_cookie()))
        return Identity.of(entry) if entry else None

    def _mesh_pod(self, args: PodArgs, request: Request) -> Pod | None:
        """The Pod, or None when this sandbox is none of ours. Raises PodNotFound.

        The runtime's annotations spare looking for a Pod outside of the mesh: it starts while the API server is away.
        Of one that is they say too little.
        """
        config = request.config
        reason = skip_unseen(
            args.namespace,
            args.name,
            config.pod_namespace,
            config.exclude_namespaces,
            config.runtime_config.annotations,
        )
        pod = None if reason else self.pods.find(args.namespace, args.name, args.uid or None)
        if pod is not None:
            reason = skip_reason(pod)
        if reason:
            log.info("pod.skipped", pod=f"{args.namespace}/{args.name}", container=request.container_id, reason=reason)
            return None
        return pod


def _identity(request: Request, pod: Pod, known: Identity | None) -> Identity:
    """Whose the entry is to be: of several attachments of one container the first's, with multus say.

    When a later one is taken away the container goes on, and so does its capture.
    """
    asked = Identity(
        uid=pod.uid or "",
        name=pod.name,
        namespace=pod.namespace,
        container_id=request.container_id,
        network=request.config.name,
        ifname=request.ifname,
    )
    if known is None or known.is_adopted or known.container_id != asked.container_id:
        return asked
    return replace(asked, network=known.network, ifname=known.ifname)


def _cookie(netns_fd: int | None) -> int | None:
    """Of the namespace that a DEL came with, if it is one: a DEL fails for nothing."""
    if netns_fd is None:
        return None
    try:
        return visit(netns_fd, lambda _: own_cookie())
    except SandboxInvalid:
        return None


def _netns(netns_fd: int | None) -> int:
    if netns_fd is None:
        raise SandboxInvalid(
            "the request came without a network namespace; the shim passes CNI_NETNS as a file descriptor",
            code=Code.INVALID_ENVIRONMENT,
        )
    require_netns(netns_fd)
    return netns_fd
