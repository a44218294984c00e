"""Serves the unix socket that the shim talks to: accept, check the peer's uid, read one request, answer it, close.

Many connections are served at the same time.
"""

import fcntl
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from bpf.errors import SidestepError
from cni import protocol
from cni.errors import CniError, Code
from cni.protocol import SOCKET_NAME
from cni.rundir import open_private
from cni.verbs import Verbs

log = structlog.get_logger("server")

# Called for each request with its command ("" if the request could not be parsed), the CNI code of the answer
# (0: success) and the seconds that the answer took.
Observer = Callable[[str, int, float], None]

# Threads that read requests, and threads that answer them, by verb: an ADD may wait seconds for the API server, and
# must keep neither a DEL from ending a pod nor a STATUS from being answered.
_READERS = 16
_STATUS, _ORDER = "STATUS", "ORDER"
_WORKERS = {"ADD": 32, "CHECK": 8, "DEL": 8, _STATUS: 4, "GC": 2, _ORDER: 8}
_BACKLOG = 512
_LOOK_SECONDS = 1.0  # between two looks whether the socket is still at its path
# limit for each read and for sending the answer, so that a client that stops half-way does not keep a worker
_REQUEST_SECONDS = 5.0
_MAX_PATH = 107  # sun_path less the NUL, unix(7)
_UCRED = struct.Struct("3i")


def _unlogged() -> list[str]:
    """The default: nobody keeps log lines."""
    return []


def _unobserved(command: str, code: int, seconds: float) -> None:
    """The default Observer: does nothing."""


class Server:
    """Serves `verbs` on `<run_dir>/cni.sock` until stopped.

    Only root is served: the directory has mode 0700, the socket has mode 0600, and the server checks the peer's uid as
    well. (The plugin checks the server's.) Only one agent can serve a directory: a second agent is refused. A socket
    that a killed agent left behind is replaced.
    """

    def __init__(
        self,
        run_dir: Path,
        verbs: Verbs,
        observe: Observer = _unobserved,
        logged: Callable[[], list[str]] = _unlogged,
    ) -> None:
        """Listen. `logged` gives the agent's last log lines.

        Raises SidestepError if another agent serves the directory, or the socket cannot be made there.
        """
        self._verbs = verbs
        self._observe, self._logged = observe, logged
        with ExitStack() as undo:
            self._directory = open_private(run_dir)
            undo.callback(os.close, self._directory)
            _lock(self._directory, run_dir)
            self._listener = _listen(self._directory, run_dir)
            self._file = _file_at(run_dir / SOCKET_NAME)
            undo.pop_all()
        self._run_dir = run_dir
        self._ending = False
        self._told = ""  # why the socket can't be made again
        self._wake, self._stopper = socket.socketpair()
        self._stopper.setblocking(False)

    @property
    def wakes(self) -> int:
        """A non-blocking file descriptor. Writing a byte to it has the same effect as stop()."""
        return self._stopper.fileno()

    def why_deaf(self) -> str:
        """Why the plugin reaches no agent at the socket's path; "" if it reaches this one."""
        path = self._run_dir / SOCKET_NAME
        found = _file_at(path)
        if found is None:
            return f"{path} is gone"
        return "" if found == self._file else f"{path} is not this agent's"

    def stop(self) -> None:
        """Make serve() finish the requests under way and return. May be called from a signal handler."""
        with suppress(BlockingIOError):  # the socket is full of earlier calls
            self._stopper.send(b"x")

    def serve(self) -> None:
        """Accept connections until stop(). Then remove the socket, finish what is under way, and fail the rest."""
        with ExitStack() as pools, selectors.DefaultSelector() as ready:
            self._pools = {
                verb: pools.enter_context(ThreadPoolExecutor(count, f"cni-{verb.lower()}"))
                for verb, count in _WORKERS.items()
            }
            readers = pools.enter_context(ThreadPoolExecutor(_READERS, "cni"))  # ends first: it hands on to the others
            ready.register(self._listener, selectors.EVENT_READ)
            ready.register(self._wake, selectors.EVENT_READ)
            while True:
                events = ready.select(_LOOK_SECONDS)
                if any(key.fileobj is self._wake for key, _ in events):
                    break
                if events:
                    self._accept(readers)
                if why := self.why_deaf():
                    self._listen_again(why, ready)
            self._ending = True
            with suppress(FileNotFoundError):
                os.unlink(SOCKET_NAME, dir_fd=self._directory)
            self._listener.close()
        os.close(self._directory)

    def _accept(self, readers: ThreadPoolExecutor) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # the client has gone already, or this process is out of descriptors
            log.warning("accept.failed", error=error.strerror)
            time.sleep(0.01)
            return
        readers.submit(self._take, connection)

    def _listen_again(self, why: str, ready: selectors.BaseSelector) -> None:
        """Somebody has removed or replaced the socket or its directory: make both again."""
        try:
            directory = open_private(self._run_dir)
            try:
                if not os.path.samestat(os.fstat(directory), os.fstat(self._directory)):
                    _lock(directory, self._run_dir)
                listener = _listen(directory, self._run_dir)
            except BaseException:
                os.close(directory)
                raise
        except SidestepError as error:
            if str(error) != self._told:
                self._told = str(error)
                log.error("socket.lost", reason=why, error=str(error))
            return
        ready.unregister(self._listener)
        self._listener.close()
        self._listener = listener
        if os.path.samestat(os.fstat(directory), os.fstat(self._directory)):
            os.close(directory)  # the old descriptor has the lock
        else:
            os.close(self._directory)
            self._directory = directory
        self._file = _file_at(self._run_dir / SOCKET_NAME)
        ready.register(self._listener, selectors.EVENT_READ)
        log.warning("socket.restored", reason=why)

    def _take(self, connection: socket.socket) -> None:
        """Read a message, and have it answered."""
        descriptors: list[int] = []
        try:
            connection.settimeout(_REQUEST_SECONDS)
            uid = _peer_uid(connection)
            if uid != 0:
                log.warning("peer.refused", uid=uid)
                raise ConnectionRefusedError("the peer is not root")
            started = time.monotonic()
            text, descriptors = protocol.receive_message(connection)
            try:
                message = protocol.decode(text)
            except CniError as error:
                connection.sendall(protocol.encode(self._counted("", protocol.failure(_as_cni_error(error)), started)))
                _close(connection, descriptors)
                return
            self._hand_on(connection, message, descriptors, started)
        except (OSError, CniError, RuntimeError) as error:  # the peer is gone, or sent nothing that can be answered
            log.warning("connection.dropped", error=str(error))
            _close(connection, descriptors)

    def _hand_on(
        self, connection: socket.socket, message: protocol.Message, descriptors: list[int], started: float
    ) -> None:
        """Have a worker answer a message. If there is nothing to answer, it is done here."""
        if isinstance(message, protocol.Passed):
            self._verbs.passed(message)
            _close(connection, descriptors)
        elif isinstance(message, protocol.Question):
            told = partial(self._told_about, message)
            self._pools[_STATUS].submit(self._answer, connection, descriptors, told)
        elif isinstance(message, protocol.Order):
            done = partial(self._carried_out, message)
            self._pools[_ORDER].submit(self._answer, connection, descriptors, done)
        else:
            reply = partial(self._reply, message, descriptors, started)
            self._pools[message.command].submit(self._answer, connection, descriptors, reply)

    def _answer(self, connection: socket.socket, descriptors: list[int], answer: Callable[[], dict[str, Any]]) -> None:
        try:
            connection.sendall(protocol.encode(answer()))
        except OSError as error:
            log.warning("connection.dropped", error=str(error))
        finally:
            _close(connection, descriptors)

    def _told_about(self, question: protocol.Question) -> dict[str, Any]:
        asks: dict[str, Callable[[], object]] = {
            "WHO_PASSED": self._verbs.who_passed,
            "WHO_WAS_REFUSED": self._verbs.refusals.documents,
            "WHO_WAS_TAKEN_OVER": self._verbs.who_was_taken_over,
            "WHO_IS_AMBIENT": self._verbs.who_is_ambient,
            "WHAT_FAILED": self._verbs.what_failed,
            "WHAT_WAS_LOGGED": self._logged,
        }
        return protocol.success({protocol.ANSWERS[question.command]: asks[question.command]()})

    def _carried_out(self, order: protocol.Order) -> dict[str, Any]:
        try:
            if self._ending:
                raise CniError("the agent is ending; try again", code=Code.TRY_AGAIN_LATER)
            return protocol.success({"done": self._verbs.exchange(order)})
        except Exception as error:
            return protocol.failure(_as_cni_error(error))

    def _reply(self, request: protocol.Request, descriptors: list[int], started: float) -> dict[str, Any]:
        try:
            if self._ending:  # it has waited for a worker: whoever asks again finds the next agent
                raise CniError("the agent is ending; try again", code=Code.TRY_AGAIN_LATER)
            answer = protocol.success(self._verbs.run(request, descriptors[0] if descriptors else None))
            log.debug("request.done", command=request.command, container=request.container_id)
        except Exception as error:
            answer = protocol.failure(_as_cni_error(error), request.config.cni_version)
        return self._counted(request.command, answer, started)

    def _counted(self, command: str, answer: dict[str, Any], started: float) -> dict[str, Any]:
        code = answer["output"]["code"] if answer["exit"] else 0
        self._observe(command, code, time.monotonic() - started)
        return answer


def _close(connection: socket.socket, descriptors: list[int]) -> None:
    connection.close()
    for descriptor in descriptors:
        os.close(descriptor)


def _as_cni_error(error: Exception) -> CniError:
    """Turn any error into the one that the runtime is told, and log it: here and nowhere else."""
    if not isinstance(error, SidestepError):
        log.exception("request.crashed")
        return CniError(f"internal error: {type(error).__name__}: {error}; please report it with the agent's log")
    told = error if isinstance(error, CniError) else CniError(str(error))
    log.error("request.failed", code=int(told.code), error=str(told))
    return told


def _lock(directory: int, run_dir: Path) -> None:
    """Lock the directory for this process. Raises SidestepError if another agent has locked it."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SidestepError(
            f"another agent serves {run_dir}; stop it or give this one its own --cni-agent-run-dir"
        ) from None


def _listen(directory: int, run_dir: Path) -> socket.socket:
    """Listen on a new socket in the directory, replacing the one a killed agent left there. Raises SidestepError."""
    path = run_dir / SOCKET_NAME
    if len(os.fsencode(path)) > _MAX_PATH:
        raise SidestepError(
            f"{path} is too long for a socket's path ({_MAX_PATH} bytes); give a shorter --cni-agent-run-dir"
        )
    _clear(directory, path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # bind() makes the file with the socket's own mode
        listener.bind(f"/proc/self/fd/{directory}/{SOCKET_NAME}")  # there is no bindat()
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise SidestepError(f"cannot make the CNI socket {path}: {error.strerror}") from error
    return listener


def _file_at(path: Path) -> tuple[int, int] | None:
    """The device and inode of the file at a path; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _clear(directory: int, path: Path) -> None:
    """Remove whatever file is at the socket's path; of a symbolic link, the link itself. Raises SidestepError."""
    try:
        with suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=directory)
    except OSError as error:
        raise SidestepError(f"{path} is in the way of the CNI socket: {error.strerror}; remove it") from error


def _peer_uid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])
