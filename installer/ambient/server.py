"""The socket that ztunnel connects to, and all that are connected: during its upgrade that is more than one."""

import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import structlog

from bpf.errors import SidestepError
from installer.ambient.connection import (
    ANSWER_SECONDS,
    Connection,
    Snapshot,
    ZtunnelAway,
    ZtunnelRefused,
    wait_for,
)
from installer.ambient.protocol import Workload

log = structlog.get_logger("zds")

# Istio's agent accepts five connections a second: each costs a snapshot, and a ztunnel that crashes comes at once again
_ACCEPT_SECONDS = 0.2
_MOST_CONNECTIONS = 16
_BACKLOG = 16
_LOOK_SECONDS = 1.0  # between two looks whether the socket is still at its path
_STOP_SECONDS = 3.0  # for the threads at the end
_MAX_PATH = 107  # sun_path less the NUL, unix(7)


def _nothing() -> None:
    pass


def _anybody(_: socket.socket) -> None:
    pass


class ZdsServer:
    """Serves ztunnel on a socket while running(). add(), delete() and holds() may be called from any thread."""

    def __init__(
        self,
        path: Path,
        snapshot: Snapshot,
        changed: Callable[[], None] = _nothing,
        recognise: Callable[[socket.socket], None] = _anybody,
    ) -> None:
        """`snapshot` gives the pods for a ztunnel that connects; it runs in that connection's thread.

        `changed` is called when a ztunnel has got its snapshot, or has gone. `recognise` is called before the snapshot;
        if it raises SidestepError, the ztunnel gets no pods.
        """
        self._path, self._snapshot, self._changed, self._recognise = path, snapshot, changed, recognise
        self._problem = ""  # why the last ztunnel got no pods
        self._lock = threading.Lock()
        self._open: set[Connection] = set()
        self._greeted: list[Connection] = []  # the newest last
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()
        self._file: tuple[int, int] | None = None

    @property
    def connected(self) -> int:
        """How many ztunnels are connected."""
        with self._lock:
            return len(self._greeted)

    def why_away(self) -> str:
        """Why no ztunnel takes pods; "" if one does."""
        with self._lock:
            if any(each.has_snapshot for each in self._greeted):
                return ""
            return "ztunnel is being told of the node's pods" if self._greeted else self._nobody()

    def holds(self, uid: str) -> int | None:
        """The cookie of the namespace that a ztunnel has accepted for a pod; None if none has accepted any.

        If several ztunnels are connected, the newest that has the pod counts.
        """
        with self._lock:
            greeted = list(reversed(self._greeted))
        return next((cookie for each in greeted if (cookie := each.holds(uid)) is not None), None)

    def held(self) -> set[tuple[str, int]]:
        """All that any ztunnel has accepted: UIDs of pods, with the cookies of their namespaces."""
        with self._lock:
            greeted = list(self._greeted)
        return {item for each in greeted for item in each.held().items()}

    def add(self, workload: Workload, netns: int, cookie: int) -> None:
        """Hand a pod over to the newest ztunnel, and wait until it has accepted.

        `netns` is a descriptor of the pod's network namespace, whose cookie is `cookie`. Raises ZtunnelAway,
        ZtunnelRefused, ProtocolError.
        """
        until = time.monotonic() + ANSWER_SECONDS
        with self._lock:
            newest = self._greeted[-1] if self._greeted else None
        if newest is None:
            raise ZtunnelAway(self._nobody())
        wait_for(newest.add(workload, netns, cookie), until)

    def delete(self, uid: str) -> None:
        """Take a pod back from every ztunnel, and wait until each has let go of it.

        One that goes meanwhile has let go as well. Raises ZtunnelAway if one does not answer, ZtunnelRefused.
        """
        until = time.monotonic() + ANSWER_SECONDS
        with self._lock:
            greeted = list(self._greeted)
        asked: list[tuple[Connection, Future[None]]] = []
        for each in greeted:
            with suppress(ZtunnelAway):
                asked.append((each, each.delete(uid)))
        problem: SidestepError | None = None
        for each, answered in asked:
            try:
                wait_for(answered, until)
            except (ZtunnelAway, ZtunnelRefused) as error:
                with self._lock:
                    problem = error if each in self._greeted else problem
        if problem:
            raise problem

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve in threads until the context ends. Raises SidestepError if the socket can't be made."""
        with ExitStack() as up:
            self._listener = _listen(self._path)
            self._file = _file_at(self._path)
            accepting = threading.Thread(target=self._accept_all, name="zds")
            accepting.start()
            up.callback(self._stop, accepting)
            yield

    def _stop(self, accepting: threading.Thread) -> None:
        self._stopping.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        with self._lock:
            threads = list(self._threads)
            for each in self._open:
                each.close()
        for thread in threads:
            thread.join(_STOP_SECONDS)

    def _accept_all(self) -> None:
        while not self._stopping.is_set():
            self._listener.settimeout(_LOOK_SECONDS)
            try:
                self._take(self._listener.accept()[0])
            except TimeoutError:
                self._listen_again()
                continue
            except OSError as error:  # it has gone already, or this process is out of descriptors, or stops
                if not self._stopping.is_set():
                    log.warning("accept.failed", error=error.strerror)
            self._stopping.wait(_ACCEPT_SECONDS)
        self._listener.close()
        if _file_at(self._path) == self._file:  # and not that of the next agent
            self._path.unlink(missing_ok=True)

    def _listen_again(self) -> None:
        """Make the socket again if somebody has removed it."""
        if _file_at(self._path) == self._file:
            return
        try:
            again = _listen(self._path)
        except SidestepError as error:
            log.error("socket.lost", error=str(error))
            return
        self._listener.close()
        self._listener, self._file = again, _file_at(self._path)
        log.warning("socket.restored", path=str(self._path), reason="somebody has removed it")

    def _take(self, taken: socket.socket) -> None:
        """Serve a ztunnel in a thread of its own. Raises OSError if there is no room for it."""
        try:
            with self._lock:
                if self._stopping.is_set() or len(self._open) >= _MOST_CONNECTIONS:
                    raise OSError(errno.EUSERS, f"{len(self._open)} are connected already")
                connection = Connection(taken)
                self._open.add(connection)
        except OSError:
            taken.close()
            raise
        thread = threading.Thread(target=self._serve, args=(connection,), name="ztunnel", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _serve(self, connection: Connection) -> None:
        def is_greeted() -> Snapshot:
            try:
                self._recognise(connection.socket)
            except SidestepError as error:
                self._problem = str(error)
                log.error("ztunnel.not_recognised", error=str(error))
                raise
            self._problem = ""
            with self._lock:  # from here on it is told of pods that are taken back
                self._greeted.append(connection)
            return self._snapshot

        try:
            connection.run(is_greeted, self._changed)
        except Exception:
            log.exception("ztunnel.failed")
        finally:
            with self._lock:
                self._open.discard(connection)
                if connection in self._greeted:
                    self._greeted.remove(connection)
                self._threads.discard(threading.current_thread())
        self._changed()

    def _nobody(self) -> str:
        return self._problem or f"no ztunnel is connected to {self._path}"


def _listen(path: Path) -> socket.socket:
    """Listen on a new socket, which takes the place of any that is there. Only root may connect. Raises SidestepError.

    ztunnel mounts the directory, so that stays.
    """
    fresh = path.with_name(f".{secrets.token_hex(4)}")
    if max(len(os.fsencode(each)) for each in (path, fresh)) > _MAX_PATH:
        raise SidestepError(f"{path} is too long for a socket's path ({_MAX_PATH} bytes); give a shorter one")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.fchmod(listener.fileno(), 0o600)  # bind() makes the file with the socket's own mode
        listener.bind(str(fresh))
        listener.listen(_BACKLOG)
        fresh.rename(path)
    except OSError as error:
        listener.close()
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise SidestepError(
            f"cannot make ztunnel's socket {path}: {error.filename or fresh}: {error.strerror}"
        ) from error
    return listener


def _file_at(path: Path) -> tuple[int, int] | None:
    """The device and inode of the file at a path; None if there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None
