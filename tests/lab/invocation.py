"""`sidestep` as an operator types it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bpf.kept import VARIABLE
from bpf.kernel import capabilities
from tests.lab import forking

REPOSITORY = Path(__file__).parents[2]
_DAC_READ_SEARCH = 2  # uapi/linux/capability.h


def sidestep(
    *argv: object,
    columns: int = 120,
    seconds: float = 60,
    environment: Mapping[str, str] | None = None,
    through: tuple[str, ...] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run a command of this source tree to its end; its output goes to a pipe of so many columns.

    `through` is a program that runs it, such as setpriv, with its arguments.
    """
    kept_in = {name: value for name, value in os.environ.items() if name == VARIABLE}
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "COLUMNS": str(columns), **kept_in, **(environment or {})}
    command = list(map(str, argv))
    if not through:
        return forking.run(command, env, seconds)
    command = [*through, sys.executable, "-m", "installer", *command]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=seconds)


def sidestep_by_user(*argv: object, environment: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """The same by somebody who is not root, from the interpreter's start on. Whoever runs the tests without root is."""
    return sidestep(*argv, environment=environment, through=_by_user() if os.geteuid() == 0 else ())


def _by_user() -> tuple[str, ...]:
    """A user with no rights but to read: the checkout and its .venv may be where only root may go.

    A container may lack that right; then this user finds what any user finds.
    """
    kept = "-all,+dac_read_search" if capabilities() >> _DAC_READ_SEARCH & 1 else "-all"
    rights = [f"--{which}={kept}" for which in ("bounding-set", "inh-caps", "ambient-caps")]
    return "setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", *rights


def one_line(done: "subprocess.CompletedProcess[str]") -> str:
    """What a failed command says, which has to be one line and nothing else."""
    assert (done.returncode, done.stdout) == (1, ""), done
    (line,) = done.stderr.splitlines()
    return line
