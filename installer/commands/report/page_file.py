"""Writes the page to a file: the whole page, or nothing."""

import secrets
from pathlib import Path

from bpf.errors import SidestepError


class ReportNotWritten(SidestepError):
    """The file could not be written. The message names it."""


def write(path: Path, page: str) -> None:
    """Make or replace a file with the usual permissions (umask). Raises ReportNotWritten."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe must not be replaced
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
