"""The one way into the mesh: policy and sandbox of a pod become its entries, in the order that loses no event.

ADD comes through here, and so does a pod that ran before the agent did.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Entries, Identity, entries_of
from cni.enrolment.follow import Follower
from cni.errors import SandboxInvalid
from cni.netns.plumbing import prepare
from cni.netns.rtnl import Rtnl
from cni.netns.sandbox import Sandbox, look, own_cookie, require_address, visit
from cni.netns.userns import outside_ids
from cni.policy.annotations import CapturePolicy


@dataclass(frozen=True)
class Admission:
    """Enrols pods of one node and follows them from then on. Safe to use from many threads."""

    enrolments: Enrolments
    follower: Follower
    proc: Path = Path("/proc")
    host_cookie: int = field(default_factory=own_cookie)

    def admit(self, identity: Identity, policy: CapturePolicy, netns: int) -> tuple[Entries, int]:
        """Enrol a pod or bring its enrolment up to date; returns what the maps now say, and its netns cookie.

        `netns` is a descriptor of its network namespace. All or nothing. Raises SandboxInvalid, RegistrationFailed.
        """
        ids = outside_ids(netns, policy.proxy_uid, policy.proxy_gid)
        sandbox = visit(netns, partial(self._settle_in, netns, policy))
        try:
            entries = entries_of(identity, policy, sandbox, ids)
            self.enrolments.add(sandbox.cookie, entries, netns)
        except BaseException:
            self.follower.forget(sandbox.cookie)
            raise
        if policy.strict_proxy:
            self.follower.look_for_proxies()
        return entries, sandbox.cookie

    def adopt(self, identity: Identity, policy: CapturePolicy, netns: int) -> bool:
        """As admit(), for a pod that no CNI call has told of; False when one has meanwhile, which knows better.

        Raises SandboxInvalid, RegistrationFailed.
        """
        cookie = visit(netns, lambda _: own_cookie())
        with self.enrolments.undisturbed():
            if self.enrolments.entry(cookie) is not None:
                return False
            self.admit(identity, policy, netns)
            return True

    def wanted(self, identity: Identity, policy: CapturePolicy, netns: int) -> tuple[Entries, int]:
        """What the maps should say about a pod as it is now, and its netns cookie; nothing is changed."""
        ids = outside_ids(netns, policy.proxy_uid, policy.proxy_gid)
        sandbox = visit(netns, partial(self._look, policy))
        return entries_of(identity, policy, sandbox, ids), sandbox.cookie

    def _settle_in(self, netns: int, policy: CapturePolicy, rtnl: Rtnl) -> Sandbox:
        """Inside the namespace: what changes after the look is heard of, as it is followed before."""
        self.follower.watch(own_cookie(), netns)
        sandbox = self._look(policy, rtnl)
        require_address(sandbox)
        prepare(rtnl, sandbox, sandbox.captures_ipv6(policy.dual_stack), policy.mode == "TPROXY", self.proc)
        return sandbox

    def _look(self, policy: CapturePolicy, rtnl: Rtnl) -> Sandbox:
        """The sandbox, unless it is the node. Raises SandboxInvalid."""
        sandbox = look(rtnl, policy.exclude_interfaces)
        if sandbox.cookie == self.host_cookie:
            raise SandboxInvalid(
                "CNI_NETNS is the host's own network namespace; pods with hostNetwork are never captured"
            )
        return sandbox
