"""Runs the checks on this kernel in a child process, once a kernel and version of the programs: the outcome is kept."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from bpf.compiler import sources_digest
from bpf.errors import SidestepError
from bpf.layout import Level
from installer.acceleration.checks import CHECKS
from installer.scratch import scratch_cgroup, scratch_places

log = structlog.get_logger("acceleration")

_CHILD_SECONDS = 30
_FILE = "selftest.json"  # in the run directory, which like a kernel lasts until a reboot


@dataclass(frozen=True)
class Outcome:
    """What the checks have found: name → what is wrong, empty when nothing is. `failure` is why there are none."""

    problems: Mapping[str, str]
    failure: str = ""

    @property
    def unsafe(self) -> bool:
        """Whether a check has failed that some level needs."""
        return any(self.problems.get(check.name) for check in CHECKS if check.needed is not Level.OFF)


def outcome(cgroup: Path, run_dir: Path) -> Outcome:
    """What there is to know of this kernel, from an earlier start if possible. `cgroup` is the attach point."""
    kept = run_dir / _FILE
    identity = _identity()
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_text())
        if found["identity"] == identity:
            return Outcome(found["problems"])
    tried = try_kernel(cgroup)
    if not tried.failure and not tried.unsafe:  # what has failed once is tried again at the next start
        _keep(kept, {"identity": identity, "problems": dict(tried.problems)})
    return tried


def _identity() -> str:
    """Of the kernel and of everything that is tried on it."""
    digest = hashlib.sha256(repr(os.uname()).encode() + sources_digest())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def try_kernel(cgroup: Path) -> Outcome:
    """The same, whatever is kept, and without keeping it."""
    tried = Outcome({}, "there is no cgroup to try it in")
    for place in scratch_places(cgroup):
        tried = _try(place)
        if not tried.failure:
            break
    return tried


def _try(cgroup: Path) -> Outcome:
    root = Path(__file__).parents[2]
    try:
        with scratch_cgroup(cgroup) as scratch:
            argv = [sys.executable, "-m", "installer.acceleration.selftest", str(scratch)]
            child = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=_CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return Outcome({}, f"the self-test did not end within {_CHILD_SECONDS} s")
    except SidestepError as error:
        return Outcome({}, f"the self-test could not be run: {error}")
    if child.returncode != 0:
        said = " ".join(child.stderr.strip().splitlines()[-1:])
        return Outcome({}, said or f"the self-test ended with status {child.returncode}")
    return Outcome(json.loads(child.stdout))


def _keep(path: Path, document: Mapping[str, object]) -> None:
    with suppress(OSError):  # it is only a matter of a second at the next start
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(document, file)
        fresh.rename(path)


def _child(cgroup: Path) -> dict[str, str]:
    from bpf.acceleration import is_possible
    from bpf.offsets import definitions
    from cni.annotations import CapturePolicy
    from installer.acceleration.pairs import Bench, CheckFailed
    from installer.scratch import scratch_node

    definitions()  # says what is missing
    problems = {}
    with scratch_node(cgroup, CapturePolicy(acceleration=Level.FULL)) as scratch:
        if not is_possible(scratch.pins):
            raise SidestepError("the kernel refuses the sk_msg program, or its map")
        bench = Bench(scratch)
        for check in CHECKS:
            try:
                check.run(bench)
                problems[check.name] = ""
            except (CheckFailed, OSError) as error:
                problems[check.name] = str(error)
    return problems


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(_child(Path(sys.argv[1]))))
    except Exception as error:  # whatever it is, it is a reason for level off, and for no traceback
        sys.exit(str(error))
