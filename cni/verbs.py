"""The CNI verbs, one function each: what they decide is Istio's, what they write goes through Enrolments."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from cni.annotations import CapturePolicy, policy_of
from cni.enroll import Enrolments
from cni.entries import Entries, Identity, entries_of
from cni.errors import CheckFailed, CniError, Code, InvalidRequest, SandboxInvalid
from cni.membership import skip_reason
from cni.pod import Pod, PodSource
from cni.protocol import PodArgs, Request, pod_args
from cni.sandbox import Sandbox, add_inbound_source, own_cookie, read_sandbox

log = structlog.get_logger("cni")
Output = dict[str, Any] | None


@dataclass(frozen=True)
class Verbs:
    """ADD, DEL, CHECK, STATUS and GC over one node's pods. Handlers may run at the same time in many threads."""

    pods: PodSource
    enrolments: Enrolments

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
        args = pod_args(request.args)
        pod = self._mesh_pod(args, request)
        if pod is None:
            return request.result
        policy = policy_of(pod)
        sandbox = self._sandbox(netns_fd)
        if sandbox.captures_ipv6(policy.dual_stack):
            add_inbound_source(_required(netns_fd))
        entries = _entries(request, pod, policy, sandbox)
        self.enrolments.add(sandbox.cookie, entries, _required(netns_fd))
        log.info(
            "pod.enrolled",
            pod=str(entries.identity),
            container=request.container_id,
            netns_cookie=sandbox.cookie,
            addresses=" ".join(str(ip) for ip in entries.addresses),
        )
        return request.result

    def delete(self, request: Request, netns_fd: int | None) -> Output:
        """Forget what this attachment enrolled; unknown ones are fine, and the namespace is not needed."""
        for cookie in self.enrolments.of_attachment(request.container_id, request.ifname):
            self.enrolments.remove(cookie)
            log.info("pod.removed", container=request.container_id, netns_cookie=cookie)
        return None

    def check(self, request: Request, netns_fd: int | None) -> Output:
        """Compare the maps with what the Pod asks for now. Raises CheckFailed saying what differs."""
        pod = self._mesh_pod(pod_args(request.args), request)
        sandbox = self._sandbox(netns_fd)
        if pod is None:
            return None
        entries = _entries(request, pod, policy_of(pod), sandbox)
        if found := self.enrolments.differences(sandbox.cookie, entries):
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
                self.enrolments.remove(cookie)
                log.info("pod.collected", pod=str(identity), container=identity.container_id)
        for identity in self.enrolments.reclaim():
            log.info("pod.reclaimed", pod=str(identity), container=identity.container_id)
        return None

    def _mesh_pod(self, args: PodArgs, request: Request) -> Pod | None:
        """The Pod, or None when this sandbox is none of ours. Raises PodNotFound."""
        if not args.name or not args.namespace:
            log.info("pod.skipped", container=request.container_id, reason="not a Kubernetes pod")
            return None
        pod = self.pods.find(args.namespace, args.name, args.uid or None)
        if reason := skip_reason(pod):
            log.info(
                "pod.skipped",
                pod=f"{pod.namespace}/{pod.name}",
                container=request.container_id,
                reason=reason,
            )
            return None
        return pod

    def _sandbox(self, netns_fd: int | None) -> Sandbox:
        sandbox = read_sandbox(_required(netns_fd))
        if sandbox.cookie == own_cookie():
            raise SandboxInvalid(
                "CNI_NETNS is the host's own network namespace; pods with hostNetwork are never captured"
            )
        return sandbox


def _entries(request: Request, pod: Pod, policy: CapturePolicy, sandbox: Sandbox) -> Entries:
    identity = Identity(
        uid=pod.uid or "",
        name=pod.name,
        namespace=pod.namespace,
        container_id=request.container_id,
        network=request.config.name,
        ifname=request.ifname,
    )
    return entries_of(identity, policy, sandbox)


def _required(netns_fd: int | None) -> int:
    if netns_fd is None:
        raise SandboxInvalid(
            "the request came without a network namespace; the shim passes CNI_NETNS as a file descriptor",
            code=Code.INVALID_ENVIRONMENT,
        )
    return netns_fd
