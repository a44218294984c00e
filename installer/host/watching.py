"""Waiting for something to change in directories: inotify, and looking often where there is none."""

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
# also without an event, as a directory that is mounted over tells nobody
_LOOK_SECONDS = 30.0
# while a directory is away or can't be watched, so that things are repaired within a second all the same
_BLIND_SECONDS = 0.5


class DirectoryWatcher:
    """Watches anew for every round, since a directory may have been exchanged for another."""

    def __init__(self, directories: Sequence[Path], wake: socket.socket) -> None:
        """What arrives at `wake` ends a wait."""
        self._directories = directories
        self._wake = wake
        self._problems: set[str] = set()

    def armed(self) -> "DirectoryWatch":
        """From now on changes are noticed; use as a context manager."""
        watch = DirectoryWatch(self._directories, self._wake)
        for problem in sorted(watch.problems - self._problems):
            log.warning("watch.failed", problem=problem, consequence=f"looked at every {_BLIND_SECONDS} s")
        self._problems = watch.problems
        return watch


class DirectoryWatch:
    """One round's watch. What can't be watched is in `problems`."""

    def __init__(self, directories: Sequence[Path], wake: socket.socket) -> None:
        self._wake = wake
        self._open = ExitStack()
        self.problems: set[str] = set()
        self._inotify: INotify | None = None
        try:
            self._inotify = self._open.enter_context(INotify())
        except OSError as error:  # fs.inotify.max_user_instances is 128 a user, the node's whole root
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
        """Until something that isn't our own unfinished file has changed, somebody wakes us, or it has been long."""
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
