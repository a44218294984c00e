"""Keeps the entries of enrolled pods up to date when addresses, interfaces and routes change after the ADD.

One thread waits for the kernel's events (watch.py), looks into the namespaces that had events, and updates their
entries. It keeps no namespace open, because that would keep the namespace of a deleted pod alive.
"""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import structlog

from bpf.errors import KernelRefused, SidestepError
from bpf.layout import PodEntry, PodFlags
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity, excluded_interfaces_of
from cni.enrolment.strict_proxies import StrictProxies
from cni.errors import SandboxInvalid
from cni.netns.namespaces import find_netns
from cni.netns.plumbing import is_stale, marking_of, prepare
from cni.netns.rtnl import Rtnl
from cni.netns.sandbox import Sandbox, look, visit
from cni.netns.watch import Changes, Watch
from cni.netns.watch_each import WatchEach

log = structlog.get_logger("follow")

# Seconds to wait for more events: a new address causes several, and an ADD causes some of its own. Far below the one
# second in which docs/semantics.md promises that a change counts.
_SETTLE = 0.1
# Seconds between two looks at the Pods of strict proxies: their containers come after the ADD, and may be restarted.
_PROXY_SECONDS = 0.25
_AT_ONCE = 8  # pods between two looks at what else has changed; with MAX_ADDRESSES each they take half a second
_AFTER_FAILURE = 1.0  # seconds of pause


class Swept(NamedTuple):
    """The outcome of a sweep: the pods removed with their dead namespaces, and the cookies of pods steered again."""

    gone: list[Identity]
    steered: list[int]


class Follower:
    """Follows the enrolled pods while in `with running()`. watch() and forget() may be called from any thread."""

    def __init__(self, enrolments: Enrolments, proxies: StrictProxies, proc: Path = Path("/proc")) -> None:
        self._enrolments = enrolments
        self._proxies = proxies
        self._proc = proc
        self._watch = _watch()
        self._stopping = threading.Event()
        self._pending: set[int] = set()  # pods that have changed and are not brought up to date yet
        self._served: dict[int, float] = {}  # when such a pod was brought up to date last
        self._refreshing = threading.Lock()  # held from a look to the writing of what it saw, so that the newest wins

    def watch(self, cookie: int, netns_fd: int) -> None:
        """Follow a namespace from now on. The descriptor is not kept. Raises SandboxInvalid if the kernel refuses."""
        try:
            self._watch.add(cookie, netns_fd)
        except OSError as error:
            raise SandboxInvalid(f"cannot watch the pod's network namespace: {error.strerror}") from error

    def look_for_proxies(self) -> None:
        """Have the thread look for the containers of strict proxies now, because a strict pod has been enrolled."""
        self._watch.wake()

    def cgroup_of(self, container: str) -> int:
        """The id of the cgroup of a strict proxy's container; 0 if there is none."""
        return self._proxies.cgroup_of(container)

    def forget(self, cookie: int) -> None:
        """Stop following a namespace."""
        self._watch.remove(cookie)

    def sweep(self) -> Swept:
        """Remove pods whose namespace is gone, and steer pods again whose namespace lives but has lost its link."""
        self._watch.let_go_of_unused(self._proc)
        lost = self._enrolments.unsteered()
        alive, steered = set(), []
        if lost:
            with find_netns(lost, proc=self._proc) as found:
                for cookie, netns in found:
                    alive.add(cookie)
                    if self._steer(cookie, netns):
                        steered.append(cookie)
        return Swept(self._enrolments.reclaim(alive), steered)

    def _steer(self, cookie: int, netns: int) -> bool:
        try:
            return self._enrolments.steer(cookie, netns)
        except SidestepError as error:
            log.error("pod.not_steered", netns_cookie=cookie, error=str(error))
            return False

    def look_at_all(self) -> None:
        """Bring the entries of every enrolled pod up to date: a safety net in case an event was missed."""
        self._refresh_all(frozenset(self._enrolments.cookies()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Follow in a separate thread until the `with` block ends."""
        thread = threading.Thread(target=self._run, name="follow")
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            self._watch.wake()
            thread.join()
            self._watch.close()

    def _run(self) -> None:
        """First take up the pods that were enrolled before this process started, then follow events."""
        self._guarded(self._adopt)
        while not self._stopping.is_set():
            self._guarded(self._follow_once)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Run a step and log its failure: a failure with one pod must not end the thread that follows all pods."""
        try:
            step()
        except Exception:
            log.exception("follow.failed")
            time.sleep(_AFTER_FAILURE)

    def _follow_once(self) -> None:
        is_any_strict = self._proxies.refresh()
        if not self._pending:
            changes = self._watch.wait(_PROXY_SECONDS if is_any_strict else None)
            if not changes:
                return
            self._note(changes)
            time.sleep(_SETTLE)
        self._note(self._watch.wait(0))
        self._serve()

    def _note(self, changes: Changes) -> None:
        for cookie in changes.gone:
            if self._enrolments.remove(cookie):
                log.info("pod.gone", netns_cookie=cookie)
        self._pending = (self._pending | changes.changed) - changes.gone

    def _serve(self) -> None:
        """Bring a few of the changed pods up to date, first those that have waited longest since their last turn.

        So a pod that changes all the time has its turn after the others.
        """
        enrolled = set(self._enrolments.cookies())
        self._served = {cookie: when for cookie, when in self._served.items() if cookie in enrolled}
        turn = sorted(self._pending, key=lambda cookie: self._served.get(cookie, 0.0))[:_AT_ONCE]
        self._pending.difference_update(turn)
        self._refresh_all(frozenset(turn))
        self._served.update(dict.fromkeys(turn, time.monotonic()))

    def _adopt(self) -> None:
        with find_netns(self._enrolments.cookies(), proc=self._proc) as found:
            for cookie, netns in found:
                with suppress(OSError, SandboxInvalid):
                    self._watch.add(cookie, netns)
                self._refresh(cookie, netns)

    def _refresh_all(self, cookies: frozenset[int]) -> None:
        enrolled = cookies & set(self._enrolments.cookies())
        with find_netns(enrolled, proc=self._proc) as found:
            for cookie, netns in found:
                self._refresh(cookie, netns)

    def _refresh(self, cookie: int, netns: int) -> None:
        pod = self._enrolments.entry(cookie)
        if pod is None:
            return
        try:
            with self._refreshing:
                self._bring_up_to_date(cookie, netns, pod)
        except SidestepError as error:
            log.error("pod.not_followed", pod=_name(pod), netns_cookie=cookie, error=str(error))

    def _bring_up_to_date(self, cookie: int, netns: int, pod: PodEntry) -> None:
        excluded = excluded_interfaces_of(pod)
        flags = PodFlags(pod.flags)

        def inside(rtnl: Rtnl) -> Sandbox:
            sandbox = look(rtnl, excluded, PodFlags.IPV6 in flags)
            if PodFlags.SHADOW not in flags and is_stale(rtnl, sandbox, PodFlags.IPV6 in flags):
                prepare(rtnl, sandbox, PodFlags.IPV6 in flags, marking_of(flags), self._proc)
            return sandbox

        self._enrolments.follow(cookie, visit(netns, inside), excluded)


def _watch() -> Watch | WatchEach:
    """One socket for all namespaces or, if that is not permitted, one for each. Raises KernelRefused."""
    try:
        return Watch()
    except KernelRefused as refused:
        if refused.errno != errno.EPERM:
            raise
        log.warning("watch.each", reason="no CAP_NET_BROADCAST", consequence="each pod is followed by its own socket")
        return WatchEach()


def _name(pod: PodEntry) -> str:
    return f"{pod.namespace.decode()}/{pod.name.decode()}"
