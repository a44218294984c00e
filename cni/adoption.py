"""Enrols pods that run already: made before the plugin was in the chain, or while it was kept from doing its work.

No CNI call tells of them, so their namespaces are found through their processes. Their proxies listen already, which
the programs have not seen: those sockets are fetched from the process and registered as sockops would have. Connections
that exist stay what they are, the next ones are captured.
"""

import ctypes
import os
import socket
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from bpf.errors import SidestepError
from bpf.layout import INBOUND_PORT, OUTBOUND_PORT
from bpf.pins import Descriptor
from cni.admission import Admission
from cni.annotations import CapturePolicy, policy_of
from cni.entries import Identity
from cni.errors import SandboxInvalid
from cni.ids import outside_ids
from cni.pod import Pod
from cni.processes import Crowd, crowds, open_netns
from cni.sandbox import look, own_cookie, visit

log = structlog.get_logger("adoption")

_PIDFD_GETFD = 438  # asm-generic/unistd.h, Linux 5.6; the same on every architecture
_LIBC = ctypes.CDLL(None, use_errno=True)
_IFNAME = "eth0"  # what runtimes call a pod's first interface


@dataclass(frozen=True)
class Outcome:
    """What became of one pod: `problem` is empty when it is enrolled."""

    pod: Pod
    problem: str = ""
    cookie: int = 0
    listeners: int = 0


@dataclass(frozen=True)
class Adoption:
    """Finds running pods on the node that `proc` shows, and enrols them."""

    admission: Admission
    proc: Path = Path("/proc")

    def adopt(self, pods: Collection[Pod]) -> Iterator[Outcome]:
        """Enrol pods that are not; an outcome for each whose namespace was found, and none for the others.

        A pod without a process has none to find. One walk of /proc serves all of them.
        """
        if not pods:
            return
        around = list(crowds(self.proc).values())
        for pod, crowd in self._matched(pods, around):
            netns = open_netns(self.proc, crowd)
            if netns is None:
                continue
            with Descriptor(netns):
                try:
                    yield self._adopt(pod, crowd, netns)
                except SidestepError as error:
                    yield Outcome(pod, str(error))

    def _matched(self, pods: Iterable[Pod], around: list[Crowd]) -> Iterator[tuple[Pod, Crowd]]:
        """By container, else by address: a status may know of no container yet, or cgroups may not show their ids."""
        by_container = {each: crowd for crowd in around for each in crowd.containers}
        left = []
        for pod in pods:
            crowd = next((by_container[each] for each in pod.container_ids if each in by_container), None)
            if crowd:
                yield pod, crowd
            elif pod.status.pod_ip:
                left.append(pod)
        if left:
            by_address = {address: crowd for crowd in reversed(around) for address in self._addresses(crowd)}
            for pod in left:
                if pod.status.pod_ip in by_address:
                    yield pod, by_address[pod.status.pod_ip]

    def _addresses(self, crowd: Crowd) -> list[str]:
        netns = open_netns(self.proc, crowd)
        if netns is None:
            return []
        with Descriptor(netns), suppress(SandboxInvalid):
            return [str(each.ip) for each in visit(netns, look).addresses]
        return []

    def _adopt(self, pod: Pod, crowd: Crowd, netns: int) -> Outcome:
        policy = policy_of(pod)
        cookie = visit(netns, lambda _: own_cookie())
        # before the pod is seen by the programs: from then on what is captured and finds no listener is refused
        count = self._register_listeners(cookie, policy, crowd, netns)
        self.admission.admit(self._identity(pod, crowd, cookie), policy, netns)
        log.info("pod.adopted", pod=f"{pod.namespace}/{pod.name}", netns_cookie=cookie, listeners=count)
        return Outcome(pod, "", cookie, count)

    def _identity(self, pod: Pod, crowd: Crowd, cookie: int) -> Identity:
        """With the sandbox's own container, whose id a DEL will have; where no process shows it, it has to do without.

        Then the end of the namespace removes the pod. The network is left open, so that no GC takes it for a left-over.
        """
        sandbox = next((each for each in crowd.containers if each not in pod.container_ids), f"netns-{cookie}")
        return Identity(pod.uid or "", pod.name, pod.namespace, sandbox, "", _IFNAME)

    def _register_listeners(self, cookie: int, policy: CapturePolicy, crowd: Crowd, netns: int) -> int:
        count = 0
        for pid in self._proxies(policy, crowd, netns):
            for listener in self._listening(pid):
                with listener:
                    address, port = listener.getsockname()[:2]
                    if port == INBOUND_PORT:
                        count += self.admission.enrolments.add_listener(cookie, port, listener.fileno())
                    elif port == OUTBOUND_PORT and policy.early_outbound and address in ("0.0.0.0", "::"):
                        self.admission.enrolments.has_started(cookie)
        return count

    def _proxies(self, policy: CapturePolicy, crowd: Crowd, netns: int) -> Iterator[int]:
        """The processes that run as the proxy: nobody else's listener gets the pod's traffic."""
        uid, gid = outside_ids(netns, policy.proxy_uid, policy.proxy_gid)
        for pid in crowd.pids:
            with suppress(OSError):
                lines = (self.proc / str(pid) / "status").read_text().splitlines()
                ids = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith(("Uid:", "Gid:"))}
                if ids["Uid:"] == uid or ids["Gid:"] == gid:
                    yield pid

    def _listening(self, pid: int) -> Iterator[socket.socket]:
        """Copies of the process's listening TCP sockets; each is closed by whoever takes it."""
        try:
            pidfd = Descriptor(os.pidfd_open(pid))
            numbers = sorted(int(each.name) for each in (self.proc / str(pid) / "fd").iterdir())
        except OSError:
            return
        with pidfd as process:
            for number in numbers:
                with suppress(OSError):
                    if stat.S_ISSOCK((self.proc / str(pid) / "fd" / str(number)).stat().st_mode):
                        yield from _if_listening(_fetch(process.fd, number))


def _fetch(pidfd: int, number: int) -> int:
    """A descriptor of another process as one of ours. Raises OSError."""
    got = int(_LIBC.syscall(_PIDFD_GETFD, pidfd, number, 0))
    if got < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return got


def _if_listening(fd: int) -> Iterator[socket.socket]:
    copy = socket.socket(fileno=fd)
    if (
        copy.family in (socket.AF_INET, socket.AF_INET6)
        and copy.type == socket.SOCK_STREAM
        and copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        yield copy
    else:
        copy.close()
