"""What an agent knows of its node for ambient mode, and what it does there."""

import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from cni.enrolment.entries import Identity
from cni.enrolment.whose_netns import Inhabited
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.enablement import Enablement
from cni.policy.pod import Pod, PodEvents, PodSource
from installer.ambient.redirection import Annotate


class Capture(Protocol):
    """The kernel's half: which network namespaces are captured for ztunnel. Any thread may call."""

    def admit(
        self, pod: Pod, identify: Callable[[Identity | None], Identity], policy: AmbientPolicy, netns: int
    ) -> int:
        """Capture a namespace, given by a descriptor, or bring its entries up to date. Returns its cookie.

        `identify` gets the identity that is enrolled so far, and returns the one to enrol. Raises SidestepError; the
        maps are then as before.
        """
        ...

    def leave(self, cookie: int) -> None:
        """End capture of a namespace."""
        ...

    def accepted(self, cookie: int) -> None:
        """Handle that a ztunnel has accepted a namespace."""
        ...

    def whose(self, cookie: int) -> str | None:
        """The UID of the pod whose namespace it is, if that is captured for ztunnel; otherwise None."""
        ...

    def enrolled(self) -> Mapping[int, str]:
        """The UIDs of the pods that are captured for ztunnel, by the cookies of their namespaces."""
        ...


class NamespaceLabels(Protocol):
    """Where labels of namespaces come from."""

    def labels_of(self, name: str) -> Mapping[str, str] | None:
        """The labels of a namespace; None if it is not known."""
        ...


@dataclass(frozen=True)
class Node:
    """What the members of a node are found and told by."""

    pods: PodSource
    namespaces: NamespaceLabels
    enablement: Enablement
    capture: Capture
    # the pods whose namespaces are found, through their processes
    inhabited: Callable[[Collection[Pod]], Iterator[Inhabited]]
    # the namespaces of cookies: cookie and descriptor of each that is found
    find_netns: Callable[[Collection[int]], AbstractContextManager[Iterator[tuple[int, int]]]]
    identity: Callable[[Inhabited], Identity]  # of a pod that no ADD has enrolled
    recognise: Callable[[socket.socket], None]  # a ztunnel that has connected, for the kernel; raises SidestepError
    annotate: Annotate
    events: PodEvents
    policy: AmbientPolicy  # where a Pod's annotations say nothing
