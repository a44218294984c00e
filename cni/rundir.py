"""The directory of the CNI socket, which belongs to root alone.

The agent opens the directory once and works in it only through that file descriptor. The directories above it belong to
the operator. A user who may write to them can put another directory in its place, but cannot answer the plugin from
there, because the plugin checks that root serves the socket.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

from bpf.errors import SidestepError


def open_private(path: Path) -> int:
    """Make or open a directory of root's with mode 0700. Returns a descriptor of it, which the caller closes.

    Symbolic links above `path` are followed (/var/run is one), but `path` itself must not be one. A directory that
    exists with another mode gets mode 0700. Raises SidestepError that names the directory and the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        wrong = " is a symbolic link; make it a directory" if path.is_symlink() else f": {error.strerror}"
        raise SidestepError(f"run directory {path}: {error.filename}{wrong}") from error
    try:
        found = os.fstat(fd)
        if found.st_uid not in (0, os.geteuid()):
            raise SidestepError(f"run directory {path} belongs to uid {found.st_uid}; it must belong to root")
        if stat.S_IMODE(found.st_mode) != 0o700:
            os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd
