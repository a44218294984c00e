"""When to try again what has failed for a pod."""

import random
import time
from dataclasses import dataclass

# pauses in seconds: the first, which doubles each time, and the longest; each varies by this share
_FIRST_PAUSE, _LONGEST_PAUSE, _JITTER = 0.25, 10.0, 0.1
# attempts that are due within so many seconds are made together, because each look for namespaces walks /proc
_TOGETHER_SECONDS = 0.2


@dataclass(frozen=True)
class _Failure:
    """Since when something fails, how often it has, and when the next attempt is due, on the monotonic clock."""

    since: float
    times: int
    due: float
    why: str


class Attempts:
    """The pods that something has failed for, by UID. One thread changes it; any may ask what is known."""

    def __init__(self) -> None:
        self._failures: dict[str, _Failure] = {}

    def failed(self, uid: str, why: str) -> float:
        """Note that an attempt has failed, and why. Returns for how many seconds all attempts have."""
        now = time.monotonic()
        before = self._failures.get(uid) or _Failure(now, 0, now, why)
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(before.times, 10))
        due = now + pause * random.uniform(1 - _JITTER, 1 + _JITTER)
        self._failures[uid] = _Failure(before.since, before.times + 1, due, why)
        return now - before.since

    def forget(self, uid: str) -> None:
        """Note that an attempt has succeeded, or that there is no need for another."""
        self._failures.pop(uid, None)

    def known(self) -> set[str]:
        """The pods that the last attempt has failed for."""
        return set(self._failures)

    def reasons(self) -> dict[str, str]:
        """Why the last attempt for each of these pods has failed, by UID."""
        return {uid: failure.why for uid, failure in list(self._failures.items())}

    def due(self) -> set[str]:
        """The pods for which it is time to try again."""
        soon = time.monotonic() + _TOGETHER_SECONDS
        return {uid for uid, failure in self._failures.items() if failure.due <= soon}

    def next_due(self) -> float:
        """When the next attempt is due, on the monotonic clock."""
        return min((failure.due for failure in self._failures.values()), default=float("inf"))
