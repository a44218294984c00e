"""The CNI verbs, one method each. They decide by Istio's rules, and write to the kernel through Enrolments only."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import structlog

from bpf.errors import SidestepError
from bpf.layout import PodFlags
from cni.enrolment.admission import Admission
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity, on_uncaptured
from cni.enrolment.exchange import Exchange
from cni.enrolment.follow import Follower
from cni.enrolment.left_out import LeftOut, LetPass
from cni.enrolment.refusals import Refusals, for_owners
from cni.enrolment.whereabouts import Whereabouts
from cni.errors import (
    DETACHED,
    CapturedByIstio,
    CheckFailed,
    CniError,
    Code,
    InvalidAnnotation,
    InvalidRequest,
    NotCaptured,
    NotExchanged,
    SandboxInvalid,
)
from cni.netns.sandbox import own_cookie, require_netns, visit
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.annotations import INVALID_DROP, CapturePolicy
from cni.policy.membership import skip_pod, skip_unseen
from cni.policy.pod import NoEvents, Pod, PodEvents, PodSource
from cni.protocol import Order, Passed, PodArgs, Request, pod_args

log = structlog.get_logger("cni")


class Ambient(Protocol):
    """The pods in ambient mode. Each method may raise SidestepError."""

    def why_not(self, pod: Pod) -> str | None:
        """Why a Pod is not in ambient mode; None if it is. Raises CniError if it can't be told now."""
        ...

    def enrol(self, pod: Pod, identify: Callable[[Identity | None], Identity], netns: int) -> int:
        """Bring a pod in; all of it or nothing. Returns the cookie of its namespace.

        `identify` gets the identity that is enrolled for the namespace so far, and returns the one to enrol.
        """
        ...

    def policy_of(self, pod: Pod) -> AmbientPolicy | None:
        """What is captured of a Pod in ambient mode; None if it is not in it."""
        ...

    def removed(self, cookie: int) -> None:
        """Handle that a DEL or a GC has ended capture of a namespace. Never raises."""
        ...

    def document(self) -> dict[str, Any]:
        """Which pods are in the mesh and which should be and are not yet, as plain values. Never raises.

        ztunnels: how many are connected. problem: why none takes pods, "" if one does. pods: a row for each pod with
        its name (pod), uid, state ("ambient" or "pending") and the reason of what has failed for it, "" if nothing has.
        """
        ...


Output = dict[str, Any] | None
# the possible outcomes of an ADD
RESULTS = ENROLLED, NOT_IN_MESH, FAILED = "enrolled", "not_in_mesh", "failed"


def _unobserved(result: str) -> None:
    """The default observer: does nothing."""


# An ADD with so many rules takes tens of milliseconds longer than one without any.
_MANY_RULES = 1_000


def _nobody() -> None:
    pass


@dataclass(frozen=True)
class Verbs:
    """ADD, DEL, CHECK, STATUS and GC over one node's pods. Handlers may run at the same time in many threads."""

    pods: PodSource
    enrolments: Enrolments
    follower: Follower
    admission: Admission
    whereabouts: Whereabouts
    events: PodEvents = field(default_factory=NoEvents)
    observe: Callable[[str], None] = _unobserved  # called after each ADD with one of RESULTS
    call_for_help: Callable[[], None] = _nobody  # called if an ADD finds the programs detached
    left_out: LeftOut = field(default_factory=LeftOut)  # tells of pods that are not captured
    refusals: Refusals = field(default_factory=Refusals)  # remembers the pods that were refused
    ambient: Ambient | None = None  # if the node has ambient mode
    exchanges: Exchange | None = None  # None: this agent exchanges no pods
    what_failed: Callable[[], list[dict[str, Any]]] = list  # connections that were refused or denied
    # The interpreter runs one thread at a time. If 16 ADDs take turns at each system call, each takes twice as long. So
    # they take turns as a whole, and those that write many rules have a turnstile of their own.
    turnstile: threading.Lock = field(default_factory=threading.Lock)
    wide_turnstile: threading.Lock = field(default_factory=threading.Lock)

    def run(self, request: Request, netns_fd: int | None) -> Output:
        """Run a request's verb. Returns the object that the shim prints (None: nothing). Raises SidestepError.

        `netns_fd` is a descriptor of the pod's network namespace; the caller closes it.
        """
        handlers: dict[str, Callable[[Request, int | None], Output]] = {
            "ADD": self.add,
            "DEL": self.delete,
            "CHECK": self.check,
            "STATUS": self.status,
            "GC": self.collect,
        }
        return handlers[request.command](request, netns_fd)

    def add(self, request: Request, netns_fd: int | None) -> Output:
        """Enrol the pod if it is a mesh pod. In either case, return the previous result unchanged."""
        result = FAILED
        try:
            result = self._add(request, netns_fd)
        except SidestepError as error:
            self._note_refusal(request, error)
            raise
        finally:
            self.observe(result)
        return request.result

    def _note_refusal(self, request: Request, error: SidestepError) -> None:
        with suppress(InvalidRequest):
            args = pod_args(request.args)
            if args.namespace and args.name:
                self.refusals.refuse(args.namespace, args.name, error)

    def _add(self, request: Request, netns_fd: int | None) -> str:
        pod = self._mesh_pod(pod_args(request.args), request)
        if pod is None:
            return NOT_IN_MESH
        if self._skips(pod, request):
            return self._add_ambient(pod, request, _netns(netns_fd))
        policy, netns = self._policy(pod), _netns(netns_fd)
        try:
            with self.turnstile if policy.rules < _MANY_RULES else self.wide_turnstile:
                self._require_place(pod, request)
                entries, cookie, before = self.admission.admit(partial(_identity, request, pod), policy, netns)
                self._require_captured(cookie, entries.identity, before)
        except CapturedByIstio as error:
            self.events.warning(pod, "CaptureRefused", for_owners(error))
            raise
        self.refusals.forget(pod.namespace, pod.name)
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

    def _add_ambient(self, pod: Pod, request: Request, netns: int) -> str:
        """Bring a pod into ambient mode."""
        assert self.ambient is not None, "only then a pod that is skipped comes here"
        try:
            self._require_place(pod, request)
            cookie = self.ambient.enrol(pod, partial(_identity, request, pod), netns)
        except (CapturedByIstio, InvalidAnnotation) as error:
            self.events.warning(pod, "CaptureRefused", for_owners(error))
            raise
        except NotCaptured:
            self.call_for_help()
            raise
        self.refusals.forget(pod.namespace, pod.name)
        identity = _identity(request, pod, None)
        log.info("pod.enrolled", pod=str(identity), container=request.container_id, netns_cookie=cookie, mode="ambient")
        return ENROLLED

    def _policy(self, pod: Pod) -> CapturePolicy:
        """The policy that the Pod's annotations ask for. If they cannot be honoured, the Pod gets an Event too.

        Raises InvalidAnnotation.
        """
        try:
            return self.admission.policies.of(pod)
        except InvalidAnnotation as error:
            self.events.warning(pod, "CaptureRefused", for_owners(error))
            raise

    def _require_place(self, pod: Pod, request: Request) -> None:
        """Raise NotCaptured unless the programs are attached where the pod's processes will be. The Pod gets an Event.

        Nothing of the pod is enrolled yet.
        """
        try:
            self.whereabouts.require(f"{pod.namespace}/{pod.name}", request.config.runtime_config)
        except NotCaptured as error:
            self.call_for_help()
            self.events.warning(pod, "CaptureRefused", for_owners(error))
            raise

    def _require_captured(self, cookie: int, identity: Identity, before: Identity | None) -> None:
        """Raise NotCaptured unless the programs are attached: entries alone capture nothing.

        `before` is the identity enrolled before this ADD. If there was none, the new enrolment is taken back first.
        """
        if self.enrolments.is_captured(cookie):
            return
        if before is None:
            self.follower.forget(cookie)
            self.enrolments.remove(cookie)
        self.call_for_help()
        raise NotCaptured(f"{identity} would run uncaptured: {DETACHED}")

    def delete(self, request: Request, netns_fd: int | None) -> Output:
        """Take out the pod that this attachment enrolled. Succeeds too if it enrolled none or the namespace is gone."""
        for cookie in self.enrolments.of_attachment(request.container_id, request.ifname, _cookie(netns_fd)):
            self._remove(cookie)
            log.info("pod.removed", container=request.container_id, netns_cookie=cookie)
        self.left_out.leave(request.container_id)
        return None

    def check(self, request: Request, netns_fd: int | None) -> Output:
        """Compare the maps with what the Pod asks for now. Raises CheckFailed that says what differs."""
        pod = self._mesh_pod(pod_args(request.args), request)
        netns = _netns(netns_fd)
        if pod is None:
            return None
        known = self._enrolled(netns)
        identity = known if known and known.is_adopted else _identity(request, pod, known)
        ambient = self.ambient.policy_of(pod) if self.ambient and self._skips(pod, request) else None
        entries, cookie = self.admission.wanted(identity, ambient or self._wanted(pod, netns), netns)
        if found := self.enrolments.differences(cookie, entries):
            raise CheckFailed(
                f"{entries.identity} is not registered as its Pod asks: {found[0]}",
                details="; ".join(found[1:]),
            )
        return None

    def status(self, request: Request, netns_fd: int | None) -> Output:
        """Succeed if the agent can enrol pods; otherwise raise CniError with NOT_AVAILABLE.

        That there is an answer shows that the agent runs. The pins show whether the programs are attached.
        """
        if not self.enrolments.is_attached():
            raise CniError(
                "sidestep's programs are not attached on this node; restart the agent", code=Code.NOT_AVAILABLE
            )
        return None

    def collect(self, request: Request, netns_fd: int | None) -> Output:
        """Take out the pods of attachments that the runtime no longer lists, and what dead namespaces have left.

        Only attachments to the network of the request are compared. Raises InvalidRequest if there is no list.
        """
        if request.config.valid_attachments is None:
            raise InvalidRequest('"cni.dev/valid-attachments" is missing in the configuration; give GC a list')
        valid = {(item.get("containerID"), item.get("ifname")) for item in request.config.valid_attachments}
        for cookie, identity in self.enrolments.of_network(request.config.name).items():
            if (identity.container_id, identity.ifname) not in valid:
                self._remove(cookie)
                log.info("pod.collected", pod=str(identity), container=identity.container_id)
        for identity in self.follower.sweep().gone:
            log.info("pod.reclaimed", pod=str(identity), container=identity.container_id)
        return None

    def _remove(self, cookie: int) -> None:
        entry = self.enrolments.entry(cookie)
        self.follower.forget(cookie)
        self.enrolments.remove(cookie)
        if self.ambient and entry and PodFlags.AMBIENT in PodFlags(entry.flags):
            self.ambient.removed(cookie)

    def passed(self, told: Passed) -> None:
        """Note a pod that the plugin let pass at ADD without asking."""
        self.left_out.let_pass(LetPass(told.namespace, told.name, told.uid, told.container_id, told.reason))

    def exchange(self, order: Order) -> str:
        """Exchange what captures a running pod. Returns what was done. Raises SidestepError."""
        if self.exchanges is None:
            raise NotExchanged("this agent exchanges no pods")
        give = {"TAKE_OVER": self.exchanges.take_over, "GIVE_BACK": self.exchanges.give_back}
        return give[order.command](order.namespace, order.name)

    def who_was_taken_over(self) -> list[str]:
        """NAMESPACE/NAME of the pods that were taken over from Istio's rules."""
        return self.exchanges.taken_over() if self.exchanges else []

    def who_is_ambient(self) -> list[dict[str, Any]]:
        """The document of ambient mode, alone in its list; [] if this node has none."""
        return [self.ambient.document()] if self.ambient else []

    def who_passed(self) -> list[dict[str, str]]:
        """The pods that were let pass at ADD, by the plugin or by this agent, each with the reason."""
        return [{"pod": each.title, "reason": each.reason} for each in self.left_out.let_past()]

    def _enrolled(self, netns: int) -> Identity | None:
        """The identity that is enrolled for a namespace so far; None if there is none."""
        entry = self.enrolments.entry(visit(netns, lambda _: own_cookie()))
        return Identity.of(entry) if entry else None

    def _wanted(self, pod: Pod, netns: int) -> CapturePolicy:
        """The policy that the Pod asks for now. Where it says nothing, the node's default counts as it was at ADD."""
        policies, entry = self.admission.policies, self.enrolments.entry(visit(netns, lambda _: own_cookie()))
        if entry is None:
            return policies.of(pod)
        return policies.of_enrolled(pod, on_uncaptured(PodFlags(entry.flags)))

    def _mesh_pod(self, args: PodArgs, request: Request) -> Pod | None:
        """The Pod of this sandbox, or None if it is not a mesh pod. Raises PodNotFound.

        If the annotations passed by the runtime show that the Pod is outside the mesh, the Pod is not looked up. So it
        starts even while the API server is away. A mesh pod is always looked up, because annotations are not enough;
        where there is ambient mode, every Pod is, because labels decide.
        """
        config = request.config
        reason = skip_unseen(
            args.namespace,
            args.name,
            config.pod_namespace,
            config.exclude_namespaces,
            None if self.ambient else config.runtime_config.annotations,
        )
        pod = None if reason else self.pods.find(args.namespace, args.name, args.uid or None)
        if pod is not None:
            reason = self._skips(pod, request)
        if reason and pod is not None and self.ambient and self.ambient.why_not(pod) is None:
            return pod
        if reason:
            self.left_out.let_pass(LetPass(args.namespace, args.name, args.uid, request.container_id, reason))
            self.refusals.forget(args.namespace, args.name)
            return None
        return pod

    @staticmethod
    def _skips(pod: Pod, request: Request) -> str | None:
        """Why a Pod has no sidecar whose traffic is captured."""
        return skip_pod(pod, request.config.pod_namespace, request.config.exclude_namespaces)


def _identity(request: Request, pod: Pod, known: Identity | None) -> Identity:
    """The identity that the pod's entry gets; `known` is the one it has.

    A container can have several attachments (with multus, for example). The entry keeps the first attachment: if a
    later one is deleted, the container goes on running and must stay captured.
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
    """The netns cookie of a DEL's descriptor. None if it is not a namespace, because a DEL must not fail."""
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
