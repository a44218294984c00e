"""The directory that keeps compiled bytecode, so that a later process needs no compiler.

A file's name is the digest of all that its content depends on, and the file begins with a digest of name and content.
What is read there is loaded into the kernel, so the directory and its files have to belong to root (or to this
process's user), and nobody else may write to them. Whatever is otherwise is not believed.
"""

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from bpf.errors import SidestepError
from bpf.syscalls import Descriptor

VARIABLE = "SIDESTEP_BYTECODE"
# in the agent's run directory, which is the node's own and lasts until a reboot (manifests/base/sidestep.yaml)
_DEFAULT = Path("/run/sidestep/bytecode")
# kept at most; a node needs one, two while versions change, and one more of each for `sidestep trace` and for the probe
_MOST_FILES = 16
_MOST_BYTES = 8 << 20  # of a file; ours have some hundred KiB
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_DIGEST = hashlib.sha256().digest_size


class NotBelieved(SidestepError):
    """There is something, but it is not what we have written."""


class NoDirectory(SidestepError):
    """The environment names no directory in which bytecode can be kept."""


def directory() -> Path:
    """Where the environment says. Raises NoDirectory."""
    named = os.environ.get(VARIABLE, "")
    if named and not Path(named).is_absolute():
        raise NoDirectory(f'{VARIABLE}: "{named}" is not an absolute path; give one, or nothing for {_DEFAULT}')
    return Path(named or _DEFAULT)


def find(where: Path, name: str) -> bytes | None:
    """The content of a file of this name, None if there is none. Raises NotBelieved, which says why."""
    try:
        with Descriptor(_opened(where)) as parent, Descriptor(_opened(where / name, parent.fd)) as file:
            found = os.pread(file.fd, _MOST_BYTES, 0)
            with suppress(OSError):  # it may be read-only
                os.utime(file.fd)  # the files that were not used for longest go first
    except FileNotFoundError:
        return None
    digest, content = found[:_DIGEST], found[_DIGEST:]
    if digest != _digest(name, content):
        raise NotBelieved(f"{where / name} is damaged")
    return content


def keep(where: Path, name: str, content: bytes) -> None:
    """Keep the content under this name, in the place of what is there, and remove old files if there are many.

    Makes the directory if it is missing. Raises NotBelieved if it is not ours alone, OSError.
    """
    with suppress(FileExistsError):  # what is there need not be a directory
        where.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        where.mkdir(mode=0o700)
    os.close(_opened(where))
    descriptor, fresh = tempfile.mkstemp(prefix="new-", dir=where)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_digest(name, content) + content)
        Path(fresh).replace(where / name)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise
    _remove_old(where)


def _opened(path: Path, parent: int | None = None) -> int:
    """A descriptor of a directory, or of a file in the open directory `parent`.

    Raises NotBelieved, FileNotFoundError.
    """
    wanted = os.O_DIRECTORY if parent is None else os.O_NONBLOCK  # lest a FIFO keeps us waiting
    try:
        fd = os.open(path if parent is None else path.name, os.O_RDONLY | os.O_NOFOLLOW | wanted, dir_fd=parent)
    except FileNotFoundError:
        raise
    except OSError as error:  # of a symbolic link ELOOP, or ENOTDIR for a directory
        raise NotBelieved(f"{path}: {'it is a symbolic link' if path.is_symlink() else error.strerror}") from error
    try:
        found = os.fstat(fd)
        if parent is not None and not (stat.S_ISREG(found.st_mode) and found.st_size < _MOST_BYTES):
            raise NotBelieved(f"{path} is not a file of less than {_MOST_BYTES >> 20} MiB")
        if found.st_uid not in (0, os.geteuid()):
            raise NotBelieved(f"{path} belongs to uid {found.st_uid}; it must belong to root")
        if found.st_mode & _WRITABLE_BY_OTHERS:
            raise NotBelieved(f"{path} has mode {stat.S_IMODE(found.st_mode):04o}; nobody but root may write to it")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


def _remove_old(where: Path) -> None:
    """Leave the files that were used last, and what others are writing."""
    used: list[tuple[float, Path]] = []
    for path in where.iterdir():
        with suppress(FileNotFoundError):  # another process has removed it
            used.append((path.stat(follow_symlinks=False).st_mtime, path))
    for _, path in sorted(used, reverse=True)[_MOST_FILES:]:
        with suppress(OSError):
            path.unlink()
