"""`sidestep` as an operator types it."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def sidestep(
    *argv: object, columns: int = 120, seconds: float = 60, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command of this source tree to its end; its output goes to a pipe of so many columns."""
    return subprocess.run(
        [sys.executable, "-m", "installer", *map(str, argv)],
        cwd=REPOSITORY,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "COLUMNS": str(columns), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def as_user(*argv: object) -> "subprocess.CompletedProcess[str]":
    """The same without root; imported as root, as the source tree may be where the user cannot go."""
    code = "import installer.commands.cli, os, sys; os.setuid(1000); installer.commands.cli.main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )


def one_line(done: "subprocess.CompletedProcess[str]") -> str:
    """What a failed command says, which has to be one line and nothing else."""
    assert (done.returncode, done.stdout) == (1, ""), done
    (line,) = done.stderr.splitlines()
    return line
