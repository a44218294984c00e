"""The programs of the matrix that are compiled: each kept in build/matrix, and compiled again when it has changed."""

import fcntl
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.cluster.builder import BuildFailed, find_go
from tests.lab.node import REPOSITORY

BUILD = REPOSITORY / "build" / "matrix"
MIRRORS = Path(__file__).with_name("mirrors")
# Of the packages in locks/matrix.txt; the Makefile makes it.
PYTHON = BUILD / "venv" / "bin" / "python"


class NotBuilt(Exception):
    """A compiler has failed; with the end of what it said."""


def built(name: str) -> Path:
    """The program or folder of that name, up to date: `go`, `tokio` or `java`. Raises NotBuilt."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:  # tests run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return _BUILDERS[name]()
        except BuildFailed as error:
            raise NotBuilt(f"{name}: {error}") from None


def _go() -> Path:
    _run([find_go(), "build", "-buildvcs=false", "-o", BUILD / "go", "."], MIRRORS / "go")
    return BUILD / "go"


def _tokio() -> Path:
    target = BUILD / "cargo"
    _run(["cargo", "build", "--quiet", "--release", "--locked", "--target-dir", target], MIRRORS / "tokio")
    return target / "release" / "mirror"


def _java() -> Path:
    source, made = MIRRORS / "Mirror.java", BUILD / "java"
    compiled = made / "Mirror.class"
    if not compiled.exists() or compiled.stat().st_mtime < source.stat().st_mtime:
        _run(["javac", "-d", made, source], MIRRORS)
    return made


_BUILDERS: dict[str, Callable[[], Path]] = {"go": _go, "tokio": _tokio, "java": _java}


def _run(argv: list[str | Path], folder: Path) -> None:
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NotBuilt(f"{argv[0]}: {error}; `make matrix` installs it") from None
    if done.returncode:
        raise NotBuilt(f"{argv[0]}: {done.stderr[-2000:]}")
