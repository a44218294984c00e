"""The unix socket the shim talks to: accept, check who it is, read one request, answer it, close. Many at a time."""

import fcntl
import os
import selectors
import socket
import stat
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from bpf.errors import SidestepError
from cni import protocol
from cni.errors import CniError
from cni.verbs import Verbs

log = structlog.get_logger("server")

# told of every request that was answered: its command ("" for one that was not understood), the CNI code (0: success)
# and the seconds it took
Observer = Callable[[str, int, float], None]

_WORKERS = 32
_BACKLOG = 512
# a client that does not finish its request in time must not keep a worker
_REQUEST_SECONDS = 5.0
_UCRED = struct.Struct("3i")


def _unobserved(command: str, code: int, seconds: float) -> None:
    """The Observer of a server that nobody measures."""


class Server:
    """Serves `verbs` on `<run_dir>/cni.sock` until stopped.

    The directory is 0700 and the socket 0600, and the peer's uid is checked on top. One agent per directory: a second
    one is refused, a socket left by a killed one is replaced.
    """

    def __init__(self, run_dir: Path, verbs: Verbs, observe: Observer = _unobserved) -> None:
        self._verbs = verbs
        self._observe = observe
        self._path = run_dir / protocol.SOCKET_NAME
        self._lock = _lock(_private(run_dir))
        _clear(self._path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(self._path))
        finally:
            os.umask(mask)
        self._listener.listen(_BACKLOG)
        self._wake, self._stopper = socket.socketpair()

    def stop(self) -> None:
        """End serve() after the requests under way; callable from a signal handler."""
        self._stopper.send(b"x")

    def serve(self) -> None:
        """Accept until stop(); requests under way are finished, then the socket is removed."""
        with ThreadPoolExecutor(_WORKERS, "cni") as workers, selectors.DefaultSelector() as ready:
            ready.register(self._listener, selectors.EVENT_READ)
            ready.register(self._wake, selectors.EVENT_READ)
            while not any(key.fileobj is self._wake for key, _ in ready.select()):
                try:
                    connection, _ = self._listener.accept()
                except OSError as error:  # the client has gone again, or descriptors ran out
                    log.warning("accept.failed", error=error.strerror)
                    time.sleep(0.01)
                    continue
                workers.submit(self._answer, connection)
            self._path.unlink(missing_ok=True)
            self._listener.close()
        os.close(self._lock)

    def _answer(self, connection: socket.socket) -> None:
        descriptors: list[int] = []
        with connection:
            try:
                connection.settimeout(_REQUEST_SECONDS)
                uid = _peer_uid(connection)
                if uid != 0:
                    log.warning("peer.refused", uid=uid)
                    return
                message, descriptors = protocol.receive(connection)
                connection.sendall(protocol.encode(self._reply(message, descriptors)))
            except (OSError, CniError) as error:  # nobody is left to tell, or never was
                log.warning("connection.dropped", error=str(error))
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _reply(self, message: bytes, descriptors: list[int]) -> dict[str, Any]:
        started = time.monotonic()
        command, version = "", protocol.NEWEST_VERSION
        try:
            request = protocol.decode(message)
            command, version = request.command, request.config.cni_version
            answer = protocol.success(self._verbs.run(request, descriptors[0] if descriptors else None))
            log.debug("request.done", command=command, container=request.container_id)
        except Exception as error:
            answer = protocol.failure(_as_cni_error(error), version)
        code = answer["output"]["code"] if answer["exit"] else 0
        self._observe(command, code, time.monotonic() - started)
        return answer


def _as_cni_error(error: Exception) -> CniError:
    """What the runtime is told; logged here, once."""
    if not isinstance(error, SidestepError):
        log.exception("request.crashed")
        return CniError(f"internal error: {type(error).__name__}: {error}; please report it with the agent's log")
    told = error if isinstance(error, CniError) else CniError(str(error))
    log.error("request.failed", code=int(told.code), error=str(told))
    return told


def _private(run_dir: Path) -> Path:
    """Make or check the directory: root's, 0700, no symlink in the way. Raises SidestepError."""
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = run_dir.lstat()
    except OSError as error:
        raise SidestepError(f"run directory {run_dir}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise SidestepError(f"run directory {run_dir} must be a directory of this user, not a link or another's")
    _require_safe_way(run_dir)
    if found.st_mode & 0o077:
        run_dir.chmod(0o700)
    return run_dir


def _require_safe_way(run_dir: Path) -> None:
    """Whoever may write a directory on the way could put another in place of ours. Raises SidestepError."""
    for directory in run_dir.absolute().parents:
        status = directory.stat()
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise SidestepError(f"run directory {run_dir}: others may write {directory}; choose another place")


def _clear(path: Path) -> None:
    """Remove what a killed agent has left; a link itself, not what it leads to. Raises SidestepError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SidestepError(f"{path} is in the way of the CNI socket: {error.strerror}; remove it") from error


def _lock(run_dir: Path) -> int:
    """Hold the directory for this process. Raises SidestepError when another agent has it."""
    fd = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise SidestepError(
            f"another agent serves {run_dir}; stop it or give this one its own --cni-agent-run-dir"
        ) from None
    return fd


def _peer_uid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])
