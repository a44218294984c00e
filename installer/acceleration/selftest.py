"""Runs the checks in a child process, once per kernel and version of the programs, and keeps the result."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from bpf.compiler import sources_digest
from bpf.errors import SidestepError
from bpf.layout import Level
from installer.acceleration.checks import CHECKS
from installer.scratch import scratch_cgroup, scratch_places

log = structlog.get_logger("acceleration")

_CHILD_SECONDS = 60  # generous, for machines whose processors are busy
_FILE = "selftest.json"  # in the run directory, which lasts until a reboot, as the running kernel does
_SOCKETS, _MARKS = Path("/proc/net/sockstat"), Path("/proc/sys/net/ipv4/tcp_mem")


@dataclass(frozen=True)
class SelfTest:
    """Results of the checks: name → what is wrong, empty if nothing is.

    `unseen` has the checks that can't be made here: name → why. They are in `problems` too, as if nothing were wrong.
    `failure` says why there are no results. `postponed` says what the machine lacks now to run the checks.
    """

    problems: Mapping[str, str]
    failure: str = ""
    postponed: str = ""
    seconds: float = 0.0  # duration, including the child's start and the compiler
    unseen: Mapping[str, str] = field(default_factory=dict)

    @property
    def unsafe(self) -> bool:
        """Whether a check that some level needs has failed."""
        return any(self.problems.get(check.name) for check in CHECKS if check.needed is not Level.OFF)

    @property
    def is_good(self) -> bool:
        """Whether the result is complete, so that running the checks again would tell nothing new."""
        return not (self.failure or self.postponed or self.unsafe)


def kept_outcome(run_dir: Path) -> SelfTest | None:
    """The result that an earlier start or another process kept for this kernel and these programs; else None."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((run_dir / _FILE).read_text())
        if found["identity"] == _identity():
            return SelfTest(found["problems"], seconds=found["seconds"], unseen=found["unseen"])
    return None


def outcome(cgroup: Path, run_dir: Path) -> SelfTest:
    """The result for the running kernel: the kept one if there is one, else a new one. `cgroup` is the attach point."""
    if kept := kept_outcome(run_dir):
        return kept
    tried = try_kernel(cgroup)
    if tried.is_good:  # a failed result is not kept, so the next start tries again
        told = {"problems": dict(tried.problems), "unseen": dict(tried.unseen), "seconds": tried.seconds}
        _keep(run_dir / _FILE, {"identity": _identity(), **told})
    return tried


def _identity() -> str:
    """A digest of the kernel's name, the programs' sources and the checks' sources."""
    kernel = os.uname()
    # without the host name: in a container it is the pod's, which changes with each pod
    names = kernel.sysname, kernel.release, kernel.version, kernel.machine
    digest = hashlib.sha256(repr(names).encode() + sources_digest())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def try_kernel(cgroup: Path) -> SelfTest:
    """Run the checks now. A kept result is neither used nor written."""
    lack, started = memory_shortage(), time.monotonic()
    if lack:
        return SelfTest({}, postponed=lack)
    tried = SelfTest({}, "there is no cgroup to try it in")
    for place in scratch_places(cgroup):
        tried = _try(place)
        if not tried.failure:
            break
    lack = memory_shortage()
    if lack and not tried.is_good:
        return SelfTest({}, postponed=lack)
    return replace(tried, seconds=round(time.monotonic() - started, 3))


def memory_shortage() -> str:
    """Why no message is redirected on this machine now (room.c, is_memory_short); empty if memory suffices."""
    try:
        line = next(line for line in _SOCKETS.read_text().splitlines() if line.startswith("TCP:"))
        used, first = int(line.split()[-1]), int(_MARKS.read_text().split()[0])  # pages of the whole machine
    except (OSError, ValueError, StopIteration):
        return ""
    return f"TCP on this machine holds {used} pages, net.ipv4.tcp_mem allows {first} at ease" if used >= first else ""


def _try(cgroup: Path) -> SelfTest:
    root = Path(__file__).parents[2]
    try:
        with scratch_cgroup(cgroup) as scratch:
            argv = [sys.executable, "-m", "installer.acceleration.selftest", str(scratch)]
            child = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=_CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return SelfTest({}, f"the self-test did not end within {_CHILD_SECONDS} s")
    except (SidestepError, OSError) as error:
        return SelfTest({}, f"the self-test could not be run: {error}")
    if child.returncode != 0:
        said = " ".join(child.stderr.strip().splitlines()[-1:])
        return SelfTest({}, said or f"the self-test ended with status {child.returncode}")
    try:
        told = json.loads(child.stdout)
        return SelfTest(told["problems"], unseen=told["unseen"])
    except (ValueError, KeyError, TypeError):
        return SelfTest({}, f"the self-test said {child.stdout[:80]!r}")


def _keep(path: Path, document: Mapping[str, object]) -> None:
    with suppress(OSError):  # without the file, the next start only takes a second longer
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(document, file)
        fresh.rename(path)


def _child(cgroup: Path) -> dict[str, dict[str, str]]:
    from bpf.acceleration import is_possible
    from bpf.offsets import definitions
    from cni.policy.annotations import CapturePolicy
    from installer.acceleration.pairs import NotLookedAt, PairBench, PromiseBroken
    from installer.scratch import scratch_node

    definitions()  # raises NoOffsets, which names what is missing
    problems, unseen = dict[str, str](), dict[str, str]()
    with scratch_node(cgroup, CapturePolicy(acceleration=Level.FULL)) as scratch:
        if not is_possible(scratch.pins):
            raise SidestepError("the kernel refuses the sk_msg program, or its map")
        bench = PairBench(scratch)
        for check in CHECKS:
            problems[check.name] = ""
            try:
                check.run(bench)
            except NotLookedAt as why:
                unseen[check.name] = str(why)
            except (PromiseBroken, OSError) as error:
                problems[check.name] = str(error)
    return {"problems": problems, "unseen": unseen}


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(_child(Path(sys.argv[1]))))
    except Exception as error:  # any failure means level off, with its reason in one line
        sys.exit(str(error))
