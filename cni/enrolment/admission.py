"""The one way into the mesh: a pod's policy and sandbox become map entries, in an order that misses no change.

Both ADD and the adoption of running pods use it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bpf.layout import PodFlags
from cni.enrolment.ambient import ambient_entries_of
from cni.enrolment.bystanders import NEW_WITH_RULES
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Entries, Identity, entries_of
from cni.enrolment.follow import Follower
from cni.errors import CapturedByIstio, SandboxInvalid
from cni.netns.netfilter import is_captured_by_istio
from cni.netns.plumbing import AMBIENT, TPROXY, Marking, prepare
from cni.netns.rtnl import Rtnl
from cni.netns.sandbox import Sandbox, look, own_cookie, require_address, visit
from cni.netns.userns import outside_ids
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.annotations import CapturePolicy
from cni.policy.policies import Policies

Policy = CapturePolicy | AmbientPolicy


class Admitted(NamedTuple):
    """An enrolment: the pod's entries in the maps, its netns cookie, and the identity enrolled before, if any."""

    entries: Entries
    cookie: int
    before: Identity | None


@dataclass(frozen=True)
class Admission:
    """Enrols pods of one node and has them followed from then on. Safe to use from many threads."""

    enrolments: Enrolments
    follower: Follower
    proc: Path = Path("/proc")
    host_cookie: int = field(default_factory=own_cookie)
    policies: Policies = field(default_factory=Policies)
    has_shadows: bool = False  # whether pods with Istio's rules are enrolled as shadow pods, rather than refused

    def admit(
        self,
        identify: Callable[[Identity | None], Identity],
        policy: Policy,
        netns: int,
        beside_rules: bool = False,
    ) -> Admitted:
        """Enrol a pod, or bring its enrolment up to date. The policy says whether it is in ambient mode.

        `identify` is given the identity that is enrolled for the namespace so far, and returns the one to enrol.
        `netns` is a descriptor of the pod's network namespace. Raises SandboxInvalid or RegistrationFailed; the maps
        are then as before. With `beside_rules` it prepares a pod that Istio's rules capture for capture by sidestep
        as well, and enrols it as a shadow pod.
        """
        sandbox, is_shadow = visit(netns, partial(self._settle_in, netns, policy, beside_rules))
        try:
            known = self.enrolments.entry(sandbox.cookie)
            before = Identity.of(known) if known else None
            entries = _entries_of(identify(before), policy, sandbox, netns)
            if is_shadow:
                entries = replace(entries, flags=entries.flags | PodFlags.SHADOW)
            self.enrolments.add(sandbox.cookie, entries, netns)
        except BaseException:
            self.follower.forget(sandbox.cookie)
            raise
        if isinstance(policy, CapturePolicy) and policy.strict_proxy:
            self.follower.look_for_proxies()
        return Admitted(entries, sandbox.cookie, before)

    def admit_as(self, identity: Identity, policy: Policy, netns: int, beside_rules: bool = False) -> Admitted:
        """Like admit(), whatever is enrolled so far."""
        return self.admit(lambda _: identity, policy, netns, beside_rules)

    def adopt(self, identity: Identity, policy: Policy, netns: int, beside_rules: bool = False) -> bool:
        """Like admit_as(), for a running pod that no ADD has enrolled. Raises SandboxInvalid, RegistrationFailed.

        If an ADD has enrolled the pod meanwhile, its enrolment stays (an ADD knows the attachment) and this returns
        False. With `beside_rules` a shadow pod is enrolled anew, prepared to be captured.
        """
        cookie = visit(netns, lambda _: own_cookie())
        with self.enrolments.undisturbed(cookie):
            entry = self.enrolments.entry(cookie)
            if entry is not None and not (beside_rules and PodFlags.SHADOW in PodFlags(entry.flags)):
                return False
            identity = Identity.of(entry) if entry else identity  # an ADD knows the attachment
            self.admit_as(identity, policy, netns, beside_rules)
            return True

    def release(self, cookie: int) -> bool:
        """Take a running pod out of the mesh, by its netns cookie. Returns False if it was not enrolled.

        Open connections go on. What was prepared in the namespace stays, because they need it.
        """
        removed = self.enrolments.remove(cookie)
        self.follower.forget(cookie)
        return removed

    def wanted(self, identity: Identity, policy: Policy, netns: int) -> tuple[Entries, int]:
        """The entries that a pod should have as it is now, and its netns cookie. Changes nothing.

        Raises SandboxInvalid.
        """
        sandbox = visit(netns, partial(self._look, policy))
        return _entries_of(identity, policy, sandbox, netns), sandbox.cookie

    def _settle_in(self, netns: int, policy: Policy, beside_rules: bool, rtnl: Rtnl) -> tuple[Sandbox, bool]:
        """Run inside the namespace: follow it first, then look at it, so that no later change is missed; prepare it.

        Returns also whether the pod is a shadow. Its namespace stays as it is, unless it is to be captured soon. A pod
        in ambient mode is never one.
        """
        is_ruled = is_captured_by_istio()
        if is_ruled and (isinstance(policy, AmbientPolicy) or not (beside_rules or self.has_shadows)):
            raise CapturedByIstio(NEW_WITH_RULES)
        self.follower.watch(own_cookie(), netns)
        sandbox = self._look(policy, rtnl)
        require_address(sandbox)
        if beside_rules or not is_ruled:
            prepare(rtnl, sandbox, *_needs_of(policy, sandbox), self.proc)
        return sandbox, is_ruled or beside_rules

    def _look(self, policy: Policy, rtnl: Rtnl) -> Sandbox:
        """Look at the sandbox. Raises SandboxInvalid if it is the node's own namespace."""
        if isinstance(policy, AmbientPolicy):
            sandbox = look(rtnl, ipv6=policy.ipv6)
        else:
            sandbox = look(rtnl, policy.exclude_interfaces)
        if sandbox.cookie == self.host_cookie:
            raise SandboxInvalid(
                "CNI_NETNS is the host's own network namespace; pods with hostNetwork are never captured"
            )
        return sandbox


def _entries_of(identity: Identity, policy: Policy, sandbox: Sandbox, netns: int) -> Entries:
    if isinstance(policy, AmbientPolicy):
        return ambient_entries_of(identity, policy, sandbox)
    return entries_of(identity, policy, sandbox, outside_ids(netns, policy.proxy_uid, policy.proxy_gid))


def _needs_of(policy: Policy, sandbox: Sandbox) -> tuple[bool, Marking | None]:
    """Whether routes for IPv6 are needed, and how the proxy marks its connections to the application."""
    if isinstance(policy, AmbientPolicy):
        return policy.ipv6, AMBIENT
    return sandbox.captures_ipv6(policy.dual_stack), TPROXY if policy.mode == "TPROXY" else None
