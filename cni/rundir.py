"""The directory of the CNI socket: root's alone, and on a way that nobody else can turn.

Whoever may write a directory on the way, or owns a link in it, could put another directory in place of ours and answer
the plugin from there. So the way is walked name by name, each looked up in the directory that has just been examined,
and what is done in the last one is done through its descriptor.
"""

import os
import stat
from collections import deque
from contextlib import suppress
from pathlib import Path

from bpf.errors import SidestepError

_LOOK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40  # as the kernel, path_resolution(7)


def open_private(path: Path) -> int:
    """Make or open a directory with mode 0700; returns its descriptor, which the caller closes.

    Links of root's are followed on the way (/var/run), at its end none is. Raises SidestepError naming what is wrong.
    """
    walk = _Walk(path)
    try:
        fd = walk.open()
        try:
            if stat.S_IMODE(os.fstat(fd).st_mode) != 0o700:
                os.fchmod(fd, 0o700)
        except BaseException:
            os.close(fd)
            raise
        return fd
    except OSError as error:
        raise SidestepError(f"run directory {path}: {walk.where}: {error.strerror}") from error


class _Walk:
    """One way from the root directory to its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = deque(path.absolute().parts[1:])
        self._links = 0
        self.where = Path("/")

    def open(self) -> int:
        """The directory at the end. Raises SidestepError, OSError about `where`."""
        at = os.open("/", _LOOK)
        try:
            while self._names:
                at, before = self._step(at, self._names.popleft()), at
                os.close(before)
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
        finally:
            os.close(at)

    def _step(self, at: int, name: str) -> int:
        """The next directory; for a link its target is put before the names that are left."""
        self._require_unwritable(os.fstat(at))
        above, self.where = self.where, self.where / name
        found = self._look(name, at)
        self._require_own(found)
        if not stat.S_ISLNK(found.st_mode):
            following = os.open(name, _LOOK, dir_fd=at)
            self._require_own(os.fstat(following))
            return following
        if not self._names:
            raise self._wrong("is a link; it has to be a directory")
        target = Path(os.readlink(name, dir_fd=at))
        self._links += 1
        if self._links > _MAX_LINKS:
            raise self._wrong("leads through too many links")
        self._names.extendleft(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        self.where = Path("/") if target.is_absolute() else above
        return os.open("/", _LOOK) if target.is_absolute() else os.dup(at)

    def _look(self, name: str, at: int) -> os.stat_result:
        """What is there, made first if it is nothing."""
        try:
            return os.stat(name, dir_fd=at, follow_symlinks=False)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(name, 0o755 if self._names else 0o700, dir_fd=at)
            return os.stat(name, dir_fd=at, follow_symlinks=False)

    def _require_own(self, found: os.stat_result) -> None:
        if found.st_uid not in (0, os.geteuid()):
            raise self._wrong(f"belongs to uid {found.st_uid}; it has to be root's")

    def _require_unwritable(self, found: os.stat_result) -> None:
        """In a sticky directory others may make entries, but not take away or rename what isn't theirs."""
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise self._wrong("may be written by others; choose another place, or chmod go-w")

    def _wrong(self, what: str) -> SidestepError:
        return SidestepError(f"run directory {self._path}: {self.where} {what}")
