"""Keeps enrolled pods true to their namespaces: addresses, interfaces and routes that come and go after the ADD.

One thread waits for the kernel's events (watch.py), looks at the namespaces that had some, and brings their entries up
to date. It holds no namespace open: a deleted pod's must go away.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import structlog

from bpf.errors import SidestepError
from bpf.layout import PodEntry, PodFlags
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity, excluded_interfaces_of
from cni.enrolment.strict_proxies import StrictProxies
from cni.errors import SandboxInvalid
from cni.netns.namespaces import find_netns
from cni.netns.plumbing import is_stale, prepare
from cni.netns.rtnl import Rtnl
from cni.netns.sandbox import Sandbox, look, visit
from cni.netns.watch import Watch

log = structlog.get_logger("follow")

# seconds; one address comes as several events, and an ADD makes some of its own. Far below the second that is promised
_SETTLE = 0.1
# how often the Pods of strict proxies are looked at: their containers come after the ADD, and are restarted
_PROXY_SECONDS = 0.25
_AFTER_FAILURE = 1.0


class Swept(NamedTuple):
    """What a sweep has done: whose entries went with their namespaces, and which pods are steered again."""

    gone: list[Identity]
    steered: list[int]


class Follower:
    """Follows what is enrolled while running(). watch() and forget() may be called from any thread."""

    def __init__(self, enrolments: Enrolments, proxies: StrictProxies, proc: Path = Path("/proc")) -> None:
        self._enrolments = enrolments
        self._proxies = proxies
        self._proc = proc
        self._watch = Watch()
        self._stopping = threading.Event()
        self._refreshing = threading.Lock()  # between looking and writing: what was seen first is written first

    def watch(self, cookie: int, netns_fd: int) -> None:
        """Follow a namespace from now on. Raises SandboxInvalid when the kernel refuses."""
        try:
            self._watch.add(cookie, netns_fd)
        except OSError as error:
            raise SandboxInvalid(f"cannot watch the pod's network namespace: {error.strerror}") from error

    def look_for_proxies(self) -> None:
        """Look for the containers of strict proxies now: one has been enrolled."""
        self._watch.wake()

    def forget(self, cookie: int) -> None:
        """Stop following one."""
        self._watch.remove(cookie)

    def sweep(self) -> Swept:
        """Let go of the pods whose namespace is gone, and steer those again that live but have lost their link."""
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
        """Compare every enrolled pod with its namespace: a safety net, should an event ever be missed."""
        self._refresh_all(frozenset(self._enrolments.cookies()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Follow in a thread of its own meanwhile."""
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
        """Pods that were enrolled before this process first, then what happens."""
        self._guarded(self._adopt)
        while not self._stopping.is_set():
            self._guarded(self._follow_once)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Whatever goes wrong for one pod must not end the following of all."""
        try:
            step()
        except Exception:
            log.exception("follow.failed")
            time.sleep(_AFTER_FAILURE)

    def _follow_once(self) -> None:
        is_any_strict = self._proxies.refresh()
        changes = self._watch.wait(_PROXY_SECONDS if is_any_strict else None)
        if not changes.changed and not changes.gone:
            return
        time.sleep(_SETTLE)
        more = self._watch.wait(0)
        for cookie in changes.gone | more.gone:
            if self._enrolments.remove(cookie):
                log.info("pod.gone", netns_cookie=cookie)
        self._refresh_all(changes.changed | more.changed)

    def _adopt(self) -> None:
        with find_netns(self._enrolments.cookies(), proc=self._proc) as found:
            for cookie, netns in found:
                with suppress(OSError):
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
            sandbox = look(rtnl, excluded)
            if is_stale(rtnl, sandbox, PodFlags.IPV6 in flags):
                prepare(rtnl, sandbox, PodFlags.IPV6 in flags, PodFlags.TPROXY in flags, self._proc)
            return sandbox

        self._enrolments.follow(cookie, visit(netns, inside), excluded)


def _name(pod: PodEntry) -> str:
    return f"{pod.namespace.decode()}/{pod.name.decode()}"
