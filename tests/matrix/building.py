"""The programs of the matrix that are compiled: each kept in build/matrix, and compiled again when it has changed."""

import fcntl
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.cluster.builder import BuildFailed, find_go
from tests.lab.node import REPOSITORY

BUILD = REPOSITORY / "build" / "matrix"
MIRRORS, CLIENTS = (Path(__file__).with_name(name) for name in ("mirrors", "clients"))
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
    sources, made = (MIRRORS / "Mirror.java", CLIENTS / "Calls.java"), BUILD / "java"
    compiled = [made / f"{each.stem}.class" for each in sources]
    if any(not each.exists() for each in compiled) or _newest(sources) > min(map(_changed, compiled)):
        _run(["javac", "-d", made, *sources], MIRRORS)
    return made


def _newest(paths: Iterable[Path]) -> float:
    return max(map(_changed, paths))


def _changed(path: Path) -> float:
    return path.stat().st_mtime


_BUILDERS: dict[str, Callable[[], Path]] = {"go": _go, "tokio": _tokio, "java": _java}


def _run(argv: list[str | Path], folder: Path) -> None:
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NotBuilt(f"{argv[0]}: {error}; `make matrix` installs it") from None
    if done.returncode:
        raise NotBuilt(f"{argv[0]}: {done.stderr[-2000:]}")
