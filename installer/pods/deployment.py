"""Whether the agent that ends is being taken off the cluster, or merely stops."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_random_exponential

from installer.pods.answers import Change
from installer.pods.api import Api
from installer.pods.api_errors import ApiFailed
from installer.pods.listwatch import ListWatch
from installer.pods.resource import DAEMONSET, DaemonSetIdentity, daemonset_of

log = structlog.get_logger("daemonset")

# a server that does not let us watch, as that of an older Role, is not asked all the time by every node
_LONGEST_PAUSE = 120.0
# the last question, well within the 30 s that a pod has to end
_ANSWER_SECONDS = 3.0
_TRY_SECONDS, _TRY_ATTEMPTS = 8.0, 5
_BY_HAND = "all is left as it is. If it is to go: `sidestep uninstall`, on this node, with no agent running"


class Deployment:
    """The DaemonSet that this agent belongs to, if it does: with it goes what the agent has done.

    It is watched while running(), and what was seen counts: at its end an agent may not be able to ask, as its account
    can be gone together with the DaemonSet. A refusal by itself says nothing: the token of a pod that is deleted by
    force is refused too. One that was never seen is none of ours: an agent that runs without it undoes nothing.
    """

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._lock = threading.Lock()
        self._uid: str | None = None  # of the one seen last
        self._deleted = False  # that one has been, or is being
        self._watch = ListWatch(api, daemonset_of(namespace), self._listed, self._changed, _LONGEST_PAUSE)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch it meanwhile."""
        with self._watch.running():
            yield

    @property
    def is_known(self) -> bool:
        """Whether it was ever seen."""
        with self._lock:
            return self._uid is not None

    def is_deleted(self) -> bool:
        """Whether it has been, or is being, deleted. Without an answer only what was seen counts."""
        try:
            found = self._ask()
        except ApiFailed as error:
            with self._lock:
                deleted = self._deleted
            if not deleted:
                log.warning("daemonset.unknown", error=str(error), consequence=_BY_HAND)
            return deleted
        if found is None and not self.is_known:
            log.info("daemonset.never_seen", namespace=self._namespace, name=DAEMONSET, consequence=_BY_HAND)
            return False
        self._listed([found] if found else [])
        with self._lock:
            return self._deleted

    def _ask(self) -> DaemonSetIdentity | None:
        """The newest, since it may have been made again. Not for long when the answer hardly matters."""
        attempts = 1 if self._deleted else _TRY_ATTEMPTS
        patiently = Retrying(
            stop=stop_after_attempt(attempts) | stop_after_delay(_TRY_SECONDS),
            wait=wait_random_exponential(0.5, max=2.0),
            retry=retry_if_exception_type(ApiFailed),
            reraise=True,
        )
        return patiently(self._api.get_daemonset, self._namespace, _ANSWER_SECONDS)

    def _listed(self, found: list[DaemonSetIdentity]) -> None:
        for owner in found:
            self._see(owner)
        if not found and self.is_known:
            self._gone()

    def _changed(self, change: Change[DaemonSetIdentity]) -> None:
        if change.thing is not None:
            self._see(change.thing)
        if change.kind == "DELETED":
            self._gone()

    def _see(self, owner: DaemonSetIdentity) -> None:
        if owner.is_going:
            with self._lock:
                self._uid = owner.uid
            self._gone()
            return
        with self._lock:
            if owner.uid == self._uid:  # an old answer, if that was seen to go
                return
            again, self._uid, self._deleted = self._deleted, owner.uid, False
        if again:
            log.info("daemonset.made_again", uid=owner.uid, consequence="this agent undoes nothing when it ends")

    def _gone(self) -> None:
        with self._lock:
            told, self._deleted = self._deleted, True
        if not told:
            log.info("daemonset.deleted", uid=self._uid, consequence="this agent undoes what it did when it ends")
