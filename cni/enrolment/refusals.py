"""Remembers the pods that were refused, so that an operator sees them in one place, with the words that kubelet got.

What is known lives in memory only. kubelet tries a refused pod again and again, so a later agent soon knows it too.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from bpf.errors import KernelRefused, SidestepError
from cni.enrolment.known_pods import KnownPods
from cni.errors import InvalidAnnotation
from cni.policy.pod import Pod

_KERNELS_WORDS = "the kernel refused a step of it; the agent tries again, and its log has the kernel's words"


def for_owners(error: SidestepError) -> str:
    """An error as a Pod's owner is told it: without the kernel's own words, which are in the agent's log."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) or (isinstance(cause, KernelRefused) and cause.errno):
            return _KERNELS_WORDS
        cause = cause.__cause__
    return str(error)


@dataclass(frozen=True)
class Refusal:
    """A pod that was refused: the annotation that is to blame ("" if none is), the words, when last and how often."""

    annotation: str
    words: str
    at: datetime
    times: int = 1

    def document(self, pod: str) -> dict[str, Any]:
        """The same as plain values; the time is UTC."""
        return {
            "pod": pod,
            "annotation": self.annotation,
            "words": self.words,
            "at": self.at.isoformat(timespec="seconds"),
            "times": self.times,
        }


class Refusals:
    """The pods of one node that were refused, within the limit of KnownPods. Any thread may call."""

    def __init__(self) -> None:
        self._known: KnownPods[Refusal] = KnownPods()
        self._lock = threading.Lock()

    def refuse(self, namespace: str, name: str, error: SidestepError) -> None:
        """Note that a pod was refused."""
        annotation = error.annotation if isinstance(error, InvalidAnnotation) else ""
        fresh = Refusal(annotation, for_owners(error), datetime.now(UTC))
        key = (namespace, name)
        with self._lock:
            known = self._known.get(key)
            if known and known.words == fresh.words:
                fresh = replace(fresh, times=known.times + 1)
            self._known.put(key, fresh)

    def forget(self, namespace: str, name: str) -> None:
        """Note that a pod of this name was not refused this time."""
        with self._lock:
            self._known.forget((namespace, name))

    def keep_listed(self, pods: Iterable[Pod]) -> None:
        """Forget the pods that an earlier list had and this one has not. Those that no list had yet stay."""
        with self._lock:
            self._known.keep_listed(pods)

    def documents(self) -> list[dict[str, Any]]:
        """Each refused pod as plain values, the latest refusal last."""
        with self._lock:
            return [each.document(f"{namespace}/{name}") for (namespace, name), each in self._known.every()]
