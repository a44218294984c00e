"""Loads the programs into the kernel and pins them with their maps, in a child process (loader.py).

To find out what this kernel has, libbpf loads all of the kernel's types into memory; and the compiler, if no bytecode
is kept, takes far more. Both go when the child ends.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import structlog

from bpf import compiler, kept
from bpf.errors import CompileFailed, LibraryMissing
from bpf.extras import left_out
from bpf.loader import NO_BCC, Refused

log = structlog.get_logger("programs")

_LINES_SHOWN = 40  # from the end of a verifier's log, where the reason is


def load_and_pin(maps: Path, programs: Path) -> list[str]:
    """Load the programs and pin them in the directory `programs`. Returns the extras that are not in them.

    Maps that are pinned in the directory `maps` are used; missing ones are made and pinned there. Raises CompileFailed
    with the last lines of the compiler or verifier, LibraryMissing without bcc if it is needed, UnknownExtra,
    NoDirectory.
    """
    child = _run("all", maps, programs)
    if child.returncode != 0:
        words = "\n".join(child.stderr.strip().splitlines()[-_LINES_SHOWN:])
        raise CompileFailed(f"the BPF programs in {compiler.HERE} do not load on this kernel:\n{words}")
    return list(_answer(child))


def load_deaths(maps: Path, programs: Path) -> None:
    """The same for the programs that see processes die (deaths.c).

    Raises CompileFailed with one line, LibraryMissing without bcc if it is needed.
    """
    child = _run("deaths", maps, programs)
    if child.returncode != 0:
        raise CompileFailed(_last_words(child))
    _answer(child)


def try_each(scratch: Path) -> Refused:
    """Make every map and load every program by itself; nothing is attached.

    Of the program of acceleration, only its offsets are tried: the self-test loads it. `scratch` is an empty directory
    on a bpffs. The maps are pinned there and stay. Raises CompileFailed with one line, LibraryMissing without bcc if it
    is needed, UnknownExtra, NoDirectory.
    """
    child = _run("each", scratch)
    if child.returncode != 0:
        raise CompileFailed(_last_words(child))
    return Refused(**_answer(child))


def _run(what: str, *directories: Path) -> "subprocess.CompletedProcess[str]":
    left_out()  # what is wrong in the environment is told in one line
    kept.directory()
    argv = [sys.executable, "-m", "bpf.loader", what, *map(str, directories)]
    child = subprocess.run(argv, cwd=compiler.HERE.parent, capture_output=True, text=True, errors="replace")
    if child.returncode == NO_BCC:
        raise LibraryMissing("bcc is not there; install it: the package python3-bpfcc on Debian and Ubuntu")
    return child


def _answer(child: "subprocess.CompletedProcess[str]") -> Any:
    answer, told = json.loads(child.stdout)
    if told and not structlog.is_configured():  # by a command, or a child whose standard output is its own answer
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    for why, event in told.items():
        log.warning(event, why=why, instead="the programs were compiled")
    return answer


def _last_words(child: "subprocess.CompletedProcess[str]") -> str:
    """The last line with an error. bcc's very last line is useless: it says only that there was an error."""
    lines = child.stderr.strip().splitlines()
    errors = [line for line in lines if "error: " in line]
    return " ".join((errors or lines)[-1:]) or "the compiler failed and printed nothing"
