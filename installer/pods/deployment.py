"""Finds out whether an ending agent is being uninstalled, or replaced by istio-cni, or only stopped."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

from installer.pods.answers import Change
from installer.pods.api import Api
from installer.pods.api_errors import ApiFailed
from installer.pods.listwatch import ListWatch
from installer.pods.resource import DaemonSetIdentity, daemonset_of

log = structlog.get_logger("daemonset")

# longest pause, so that not every node keeps asking a server that refuses the watch, for example with an older Role
_LONGEST_PAUSE = 120.0
# timeouts of the last request, well within the 30 s that a pod has to end
_ANSWER_SECONDS = 3.0
_TRY_SECONDS, _TRY_ATTEMPTS = 8.0, 5
_DELETED = "the DaemonSet was deleted"
_BY_HAND = "nothing is undone. To take the plugin away, run `sidestep uninstall --keep-capture` while no agent runs"


# HTTP statuses by which a server says that we may not ask: our token is not, or not any more, good for that
_REFUSED = frozenset((401, 403))
_NO_RIGHT = (
    "the agent may not ask whether its DaemonSet lives on: Istio's role does not allow it, or is deleted. So the agent "
    "does as istio-cni does at each end; grant get of daemonsets (docs/migration.md) to keep the plugin in rollouts"
)


class Deployment:
    """The DaemonSet that started this agent. An ending agent takes the plugin away if the DaemonSet is deleted.

    It does so too if the DaemonSet has the image of something else now, of istio-cni for example: nobody would serve
    the plugin any more, and no mesh pod could start.

    The DaemonSet is watched while running(), and the agent remembers what it saw. An ending agent may be unable to ask,
    because its service account can be deleted together with the DaemonSet. A refused request proves nothing: the API
    server also refuses the token of a pod that is deleted by force. An agent that never saw its DaemonSet was not
    started by one, so it undoes nothing.
    """

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self._api, self._namespace, self._name = api, namespace, name
        self._lock = threading.Lock()
        self._uid: str | None = None  # of the DaemonSet seen last
        self._deleted = False  # whether the DaemonSet seen last was, or is being, deleted
        self._watch = ListWatch(api, daemonset_of(namespace, name), self._listed, self._changed, _LONGEST_PAUSE)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the DaemonSet until the context ends."""
        with self._watch.running():
            yield

    @property
    def is_known(self) -> bool:
        """Whether the DaemonSet was ever seen."""
        with self._lock:
            return self._uid is not None

    def why_leaving(self) -> str:
        """Ask why an ending agent should take the plugin away; "" if it should not.

        Without an answer, what the watch saw counts.
        """
        try:
            found = self._ask()
        except ApiFailed as error:
            with self._lock:
                deleted = self._deleted
            if not deleted:
                log.warning("daemonset.unknown", error=str(error), consequence=_BY_HAND)
            return _DELETED if deleted else ""
        if found is None and not self.is_known:
            log.info("daemonset.never_seen", namespace=self._namespace, name=self._name, consequence=_BY_HAND)
            return ""
        self._listed([found] if found else [])
        with self._lock:
            deleted = self._deleted
        return _DELETED if deleted or found is None else _why_replaced(self._api, self._namespace, found)

    def _ask(self) -> DaemonSetIdentity | None:
        """Read the DaemonSet, which may have been made again. Only one attempt if the watch saw it deleted."""
        attempts = 1 if self._deleted else _TRY_ATTEMPTS
        return _patiently(attempts)(self._api.get_daemonset, self._namespace, self._name, _ANSWER_SECONDS)

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
            if owner.uid == self._uid:  # seen before; if it was seen deleted, this answer is old
                return
            again, self._uid, self._deleted = self._deleted, owner.uid, False
        if again:
            log.info("daemonset.made_again", uid=owner.uid, consequence="this agent leaves the plugin when it ends")

    def _gone(self) -> None:
        with self._lock:
            told, self._deleted = self._deleted, True
        if not told:
            log.info("daemonset.deleted", uid=self._uid, consequence="this agent takes the plugin away when it ends")


class IstiosDeployment:
    """Istio's own DaemonSet, with our image in it.

    In sidecar mode Istio's role does not allow to read it. istio-cni takes its plugin away at each end then: pods that
    start before the next agent are held up by istio-validation, and that agent enrols them. Without the right, an agent
    of ours does the same, because the next one may be istio-cni's.
    """

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self._api, self._namespace, self._name = api, namespace, name

    @contextmanager
    def running(self) -> Iterator[None]:
        """Do nothing: Istio's role does not allow to watch the DaemonSet."""
        yield

    def why_leaving(self) -> str:
        """Ask why an ending agent should take the plugin away; "" if it should not."""
        try:
            found = _patiently(_TRY_ATTEMPTS)(self._api.get_daemonset, self._namespace, self._name, _ANSWER_SECONDS)
        except ApiFailed as error:
            if error.status in _REFUSED:
                return _NO_RIGHT
            log.warning("daemonset.unknown", error=str(error), consequence=_BY_HAND)
            return ""
        if found is None or found.is_going:
            return _DELETED
        return _why_replaced(self._api, self._namespace, found)


def _patiently(attempts: int) -> Retrying:
    """Try again while the server fails; a refusal is an answer."""
    return Retrying(
        stop=stop_after_attempt(attempts) | stop_after_delay(_TRY_SECONDS),
        wait=wait_random_exponential(0.5, max=2.0),
        retry=retry_if_exception(lambda error: isinstance(error, ApiFailed) and error.status not in _REFUSED),
        reraise=True,
    )


def _why_replaced(api: Api, namespace: str, found: DaemonSetIdentity) -> str:
    """Whether the DaemonSet's next pods run something else than this agent's image; "" if not, or if it is not known.

    Another tag, digest or registry makes no difference: only the last part of the name counts.
    """
    try:
        # outside of the host's network, a pod's host name is its own
        own = api.get_agents_image(namespace, socket.gethostname(), _ANSWER_SECONDS)
    except ApiFailed as error:
        log.warning("daemonset.unknown", error=str(error), consequence=_BY_HAND)
        return ""
    if not own or not found.image or _name_of(own) == _name_of(found.image):
        return ""
    return f"the DaemonSet has another image now: {found.image}, not {own}"


def _name_of(image: str) -> str:
    """`sidestep` of registry:5000/mesh/sidestep:0.1.0@sha256:…"""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0]
