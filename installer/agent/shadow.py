"""Compares what sidestep decides for shadow pods with what netfilter did, and tells of the first difference of each.

It also ends shadow mode: an agent without it lets the pods go that an earlier agent has made shadows.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import structlog

from bpf.layout import Cookie, Way
from bpf.tables import Tables
from cni.enrolment.entries import Identity
from cni.enrolment.shadows import Compared, Shadows, described, netfilters
from cni.netns.proc_net import endpoint
from cni.policy.pod import Pod, PodEvents
from installer.agent.looking import looking

log = structlog.get_logger("shadow")

# conntrack forgets a connection that was reset after 10 seconds, and any other later
_SECONDS = 2.0


@dataclass
class ShadowKeeper:
    """Looks every few seconds."""

    shadows: Shadows
    identities: Callable[[], Mapping[int, Identity]]
    pods_of: Callable[[Iterable[int]], Mapping[int, Pod]]
    events: PodEvents

    def look(self) -> None:
        """Compare what is new, and tell of the pods whose first differences are among it."""
        first = self.shadows.look()
        if not first:
            return
        pods, identities = self.pods_of(first), self.identities()
        for cookie, differences in first.items():
            words = in_words(differences[0])
            log.warning("shadow.different", pod=str(identities.get(cookie)), what=words)
            if cookie in pods:
                name = identities.get(cookie, "POD")
                message = f"{words}. This is the first difference; `sidestep shadow {name}` lists them"
                self.events.warning(pods[cookie], "ShadowDiffers", message)

    def running(self) -> AbstractContextManager[None]:
        """Look until the end."""
        return looking("shadow", self.look, _SECONDS)


def in_words(each: Compared) -> str:
    """One difference, as people are told it."""
    peer = endpoint(each.remote, each.port) if each.way is Way.OUT else f"port {each.port} from {each.remote}"
    ours, theirs = described(each.verdict, each.rule), netfilters(each.went_to)
    return f"{peer}: sidestep would decide {ours}, netfilter has {theirs}"


def end_shadows(tables: Tables, shadows: Iterable[int], let_go: Callable[[int], object]) -> int:
    """Let the pods go that --shadow has made shadows; returns how many. Those of a takeover under way stay."""
    count = 0
    for cookie in shadows:
        if tables.shadow_counts.get(Cookie(cookie)) is not None:
            let_go(cookie)
            count += 1
    return count
