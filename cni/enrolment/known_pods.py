"""A bounded memory of pods, by namespace and name. What is known lives in memory only."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, TypeVar

from cni.policy.pod import Pod

# pods: four times what kubelet allows on a node (maxPods is 110; 250 on large nodes)
LIMIT = 1024

Key = tuple[str, str]  # namespace and name
Known = TypeVar("Known")


class KnownPods(Generic[Known]):
    """What is known of each pod, the latest last. Beyond LIMIT, the oldest are forgotten. The caller locks."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, Known] = OrderedDict()
        self._listed: set[Key] = set()  # those that a list of Pods had

    def get(self, key: Key) -> Known | None:
        """What is known of a pod."""
        return self._known.get(key)

    def put(self, key: Key, known: Known) -> None:
        """Remember a pod, as the latest. Whether a list had it stays as it was."""
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > LIMIT:
            self.forget(next(iter(self._known)))

    def forget(self, key: Key) -> None:
        """Forget a pod. If one of this name comes later, no list had it yet."""
        self._known.pop(key, None)
        self._listed.discard(key)

    def every(self) -> list[tuple[Key, Known]]:
        """All of them, in the order in which they came."""
        return list(self._known.items())

    def note_listed(self, key: Key) -> None:
        """Note that a list of Pods has this pod."""
        self._listed.add(key)

    def keep_listed(self, pods: Iterable[Pod]) -> None:
        """Forget the pods that an earlier list had and this one has not. Those that no list had yet stay."""
        listed = {(pod.namespace, pod.name) for pod in pods}
        for key in self._listed - listed:
            self.forget(key)
        self._listed = listed & self._known.keys()
