"""The directory of the CNI socket: root's alone, whoever has put what in its place.

What is done in it is done through its descriptor. The directories above it are the operator's: who may write them could
put another directory in place of ours, but not answer the plugin from there, which asks who serves the socket.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

from bpf.errors import SidestepError


def open_private(path: Path) -> int:
    """Make or open a directory with mode 0700; returns its descriptor, which the caller closes.

    Links are followed on the way (/var/run), at its end none is. Raises SidestepError naming what is wrong.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        wrong = " is a link; it has to be a directory" if path.is_symlink() else f": {error.strerror}"
        raise SidestepError(f"run directory {path}: {error.filename}{wrong}") from error
    try:
        found = os.fstat(fd)
        if found.st_uid not in (0, os.geteuid()):
            raise SidestepError(f"run directory {path} belongs to uid {found.st_uid}; it has to be root's")
        if stat.S_IMODE(found.st_mode) != 0o700:
            os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd
