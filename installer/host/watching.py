"""Waits for changes in directories: with inotify, or by frequent checks where inotify is not possible."""

import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog
from inotify_simple import INotify, flags

from installer.host import files

log = structlog.get_logger("watch")

_CHANGES = (
    flags.CREATE
    | flags.CLOSE_WRITE
    | flags.MOVED_TO
    | flags.MOVED_FROM
    | flags.DELETE
    | flags.ATTRIB
    | flags.DELETE_SELF
    | flags.MOVE_SELF
)
# longest wait without an event: if something is mounted over a directory, no event comes
_LOOK_SECONDS = 30.0
# longest wait while a directory is missing or can't be watched, so that repairs still come within a second
_BLIND_SECONDS = 0.5


class DirectoryWatcher:
    """Makes a new watch for every round, because a directory may have been replaced by another."""

    def __init__(self, directories: Sequence[Path], wake: socket.socket) -> None:
        """Data arriving at the socket `wake` ends a wait."""
        self._directories = directories
        self._wake = wake
        self._problems: set[str] = set()

    def armed(self) -> "DirectoryWatch":
        """Start watching; returns the watch, a context manager."""
        watch = DirectoryWatch(self._directories, self._wake)
        for problem in sorted(watch.problems - self._problems):
            log.warning("watch.failed", problem=problem, consequence=f"checked every {_BLIND_SECONDS} s instead")
        self._problems = watch.problems
        return watch


class DirectoryWatch:
    """The watch of one round. `problems` says what can't be watched, and why."""

    def __init__(self, directories: Sequence[Path], wake: socket.socket) -> None:
        self._wake = wake
        self._open = ExitStack()
        self.problems: set[str] = set()
        self._inotify: INotify | None = None
        try:
            self._inotify = self._open.enter_context(INotify())
        except OSError as error:  # fs.inotify.max_user_instances is 128 for all of root's processes
            self.problems.add(f"inotify: {error.strerror}; raise fs.inotify.max_user_instances")
            return
        for directory in directories:
            try:
                self._inotify.add_watch(directory, _CHANGES | flags.ONLYDIR)
            except OSError as error:
                self.problems.add(f"{directory}: {error.strerror}")

    def __enter__(self) -> "DirectoryWatch":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def wait(self) -> None:
        """Wait until a file changes, data arrives at `wake`, or the longest wait is over.

        Changes of our own temporary files do not count.
        """
        deadline = time.monotonic() + (_BLIND_SECONDS if self.problems else _LOOK_SECONDS)
        with selectors.DefaultSelector() as ready:
            ready.register(self._wake, selectors.EVENT_READ)
            if self._inotify:
                ready.register(self._inotify, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                found = [key.fileobj for key, _ in ready.select(left)]
                if self._wake in found or (found and self._has_news()):
                    return

    def _has_news(self) -> bool:
        assert self._inotify is not None
        return any(not files.is_temporary(event.name) for event in self._inotify.read(timeout=0))
