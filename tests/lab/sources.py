"""A source tree that differs in a line: another version, or one that this kernel does not take."""

import shutil
from pathlib import Path

from tests.lab.node import REPOSITORY


def changed_copy(directory: Path, name: str, line: str, instead: str) -> Path:
    """The packages below `directory`, with `line` replaced in a file of bpf/, where it stands once."""
    for package in ("bpf", "cni", "installer"):
        shutil.copytree(REPOSITORY / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    source = directory / "bpf" / name
    text = source.read_text()
    assert text.count(line) == 1
    source.write_text(text.replace(line, instead))
    return directory
