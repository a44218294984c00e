"""Puts the page where the operator wants it: whole, or not at all."""

import secrets
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
    unfinished = path.with_name(f".sidestep-{secrets.token_hex(8)}")
    try:
        with unfinished.open("x") as file:
            file.write(page)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
