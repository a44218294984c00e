"""Reads, replaces and removes files of the host. Readers see complete files at every instant, even after a power loss.

All access is relative to an opened directory. A symbolic link in the last component is never followed, because other
programs on the host may have put one there.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bpf.errors import SidestepError
from bpf.syscalls import Descriptor

# no runtime takes a file of such a name for a plugin or a configuration (libcni reads *.conf, *.conflist and *.json)
_TEMPORARY_PREFIX = ".sidestep-tmp-"
_CHUNK = 1 << 20


class FileRefused(SidestepError):
    """A file of the host could not be read, written or removed; the message names it and the reason."""


class Found(NamedTuple):
    """A file's content, permission bits, owner and group."""

    content: bytes
    mode: int
    uid: int
    gid: int


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """Open a directory; yields its descriptor. Raises FileRefused."""
    with explained(directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with Descriptor(descriptor):
        yield descriptor


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError in the context into a FileRefused that names the path."""
    try:
        yield
    except OSError as error:
        raise FileRefused(f"{path}: {error.strerror}") from error


def read(path: Path) -> Found | None:
    """Read a regular file; None if there is none. Raises FileRefused, also for anything else than a regular file."""
    with opened(path.parent) as directory, explained(path):
        try:
            descriptor = os.open(
                path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise FileRefused(f"{path} is a symbolic link; replace it by the file itself") from error
            raise
        with Descriptor(descriptor):
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FileRefused(f"{path} is not a regular file; remove it")
            with open(descriptor, "rb", closefd=False) as file:
                return Found(file.read(), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def replace(path: Path, wanted: Found) -> None:
    """Replace or create a file. Readers see the complete old or new file, even after a power loss.

    Raises FileRefused.
    """
    name = _TEMPORARY_PREFIX + secrets.token_hex(8)
    with opened(path.parent) as directory, explained(path):
        _refuse_directory(directory, path)
        try:
            _write(directory, name, wanted)
            os.rename(name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)
            raise
        os.fsync(directory)


def remove(path: Path) -> bool:
    """Remove a file, or a link but not its target; False if there was none. Raises FileRefused."""
    with opened(path.parent) as directory, explained(path):
        try:
            os.unlink(path.name, dir_fd=directory)
        except FileNotFoundError:
            return False
        os.fsync(directory)
        return True


def clear_leftovers(directory: Path) -> None:
    """Remove temporary files that a crash during replace() has left. Raises FileRefused."""
    with explained(directory):
        for path in directory.iterdir():
            if is_temporary(path.name):
                path.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a name is that of a temporary file of replace()."""
    return name.startswith(_TEMPORARY_PREFIX)


def _refuse_directory(directory: int, path: Path) -> None:
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise FileRefused(f"{path} is a directory; remove it")


def _write(directory: int, name: str, wanted: Found) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with Descriptor(os.open(name, flags, 0o600, dir_fd=directory)) as file:
        rest = memoryview(wanted.content)
        while rest:
            rest = rest[os.write(file.fd, rest[:_CHUNK]) :]
        status = os.fstat(file.fd)
        os.fchmod(file.fd, wanted.mode)  # before fchown: chmod fails on other users' files
        if (status.st_uid, status.st_gid) != (wanted.uid, wanted.gid):
            with suppress(PermissionError):  # without CAP_CHOWN the file becomes root's; `sidestep probe` says so
                os.fchown(file.fd, wanted.uid, wanted.gid)
        os.fsync(file.fd)
