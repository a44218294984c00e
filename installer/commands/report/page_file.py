"""Puts the page where the operator wants it: whole, or not at all."""

import os
import tempfile
from pathlib import Path

from bpf.errors import SidestepError


class ReportNotWritten(SidestepError):
    """The file could not be made; the message names it."""


def write(path: Path, page: str) -> None:
    """Make or replace a file that everybody who may read the directory can read. Raises ReportNotWritten."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe: not to be replaced
            path.write_text(page)
            return
        _replace(path, page)
    except OSError as error:
        raise ReportNotWritten(f"cannot write {path}: {error.strerror}; give another file with -o") from error


def _replace(path: Path, page: str) -> None:
    made = tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".sidestep-", delete=False)  # noqa: SIM115
    try:
        with made:
            made.write(page)
        Path(made.name).chmod(0o666 & ~_umask())
        Path(made.name).replace(path)
    except BaseException:
        Path(made.name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
