"""Remembers the pods that were refused, so that an operator sees them in one place, with the words that kubelet got.

What is known lives in memory only. kubelet tries a refused pod again and again, so a later agent soon knows it too.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from bpf.errors import KernelRefused, SidestepError
from cni.errors import InvalidAnnotation
from cni.policy.pod import Pod

LIMIT = 1024  # pods: as many as left_out.py remembers
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
    was_listed: bool = False  # whether a list of Pods had it

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
    """The pods of one node that were refused. Beyond LIMIT, the oldest are forgotten. Any thread may call."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], Refusal] = OrderedDict()
        self._lock = threading.Lock()

    def refuse(self, namespace: str, name: str, error: SidestepError) -> None:
        """Note that a pod was refused."""
        annotation = error.annotation if isinstance(error, InvalidAnnotation) else ""
        fresh = Refusal(annotation, for_owners(error), datetime.now(UTC))
        key = (namespace, name)
        with self._lock:
            known = self._known.get(key)
            if known:
                times = known.times + 1 if known.words == fresh.words else 1
                fresh = replace(fresh, times=times, was_listed=known.was_listed)
            self._known[key] = fresh
            self._known.move_to_end(key)
            while len(self._known) > LIMIT:
                self._known.popitem(last=False)

    def forget(self, namespace: str, name: str) -> None:
        """Note that a pod of this name was not refused this time."""
        with self._lock:
            self._known.pop((namespace, name), None)

    def keep_listed(self, pods: Iterable[Pod]) -> None:
        """Forget the pods that an earlier list had and this one has not. Those that no list had yet stay."""
        listed = {(pod.namespace, pod.name) for pod in pods}
        with self._lock:
            for key, known in list(self._known.items()):
                if known.was_listed and key not in listed:
                    del self._known[key]
                elif key in listed and not known.was_listed:
                    self._known[key] = replace(known, was_listed=True)

    def documents(self) -> list[dict[str, Any]]:
        """Each refused pod as plain values, the latest refusal last."""
        with self._lock:
            return [each.document(f"{namespace}/{name}") for (namespace, name), each in self._known.items()]
