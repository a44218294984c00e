"""`make kernels`: what other kernels than this machine's can do, found out by booting them under software emulation."""

import json
import sys

from bpf.extras import EXTRAS, VARIABLE
from tests.kernels.limits import Fate, table, worse_than_tcp
from tests.kernels.machine import BootFailed, run
from tests.kernels.package import Kernel, fetch
from tests.lab.node import REPOSITORY

# Debian 12's own and the one of its backports
PACKAGES = ("linux-image-cloud-amd64", "linux-image-6.12-cloud-amd64")
# The probe gives these two a time that an emulated machine does not keep; they are run without it.
_TIMED = ("trial connections", "acceleration")
# as on a kernel that has none of the extras: 5.15 without type information
_WITHOUT_EXTRAS = f"env {VARIABLE}={','.join(each.name for each in EXTRAS)} "
_TRIAL = "installer.probe.trial_connections"
_SELFTEST = "installer.acceleration.selftest"
_LISTENING = "tests.kernels.listening"
_LIMITED = ("tests.kernels.limited_application", "tests.kernels.limited_proxy")


def main() -> int:
    """Exit status 0 when on every one of them capture works, and acceleration loses nothing that TCP does not."""
    kernels = [fetch(package) for package in PACKAGES]
    print("| kernel | probe | connections | without extras | acceleration | listeners |\n|---|---|---|---|---|---|")
    captures = [_tell(kernel) for kernel in kernels]
    print("\n| kernel | limited | MiB | off | proxy | full |\n|---|---|---|---|---|---|")
    return 0 if all([*captures, *map(_tell_of_limits, kernels)]) else 1


def _tell(kernel: Kernel) -> bool:
    try:
        rows = json.loads(run(kernel, f"cd {REPOSITORY} && ./sidestep probe --output json"))["rows"]
        trials = json.loads(_module(kernel, _TRIAL))
        plain_trials = json.loads(_module(kernel, _TRIAL, _WITHOUT_EXTRAS))
        tried = json.loads(_module(kernel, _SELFTEST))
        listening = json.loads(_module(kernel, _LISTENING))
    except BootFailed as error:
        print(f"| {kernel.version} | {error} | | | | |", flush=True)
        return False
    missing = [f"{row['what']}: {row['found']}" for row in rows if row["verdict"] == "no" and row["what"] not in _TIMED]
    amiss, plain = (
        [f"{what}: {found}" for what, _, found, works in each if not works] for each in (trials, plain_trials)
    )
    unsafe = [f"{check}: {problem}" for check, problem in tried["problems"].items() if problem]
    unsafe += [f"{check}: not looked at: {why}" for check, why in tried["unseen"].items()]
    unheard = [f"{step}: {problem}" for step, problem in listening.items() if problem]
    cells = ("; ".join(each) or "all good" for each in (missing, amiss, plain, unsafe, unheard))
    print(f"| {kernel.version} | {' | '.join(cells)} |", flush=True)
    return not (missing or amiss or plain)


def _tell_of_limits(kernel: Kernel) -> bool:
    try:
        fates = [Fate(**json.loads(line)) for each in _LIMITED for line in _module(kernel, each).splitlines()]
    except BootFailed as error:
        print(f"| {kernel.version} | {error} | | | | |", flush=True)
        return False
    worse = worse_than_tcp(fates)
    print("\n".join([f"| {kernel.version} {row}" for row in table(fates)] + [f"worse: {each}" for each in worse]))
    return not worse


def _module(kernel: Kernel, module: str, wrapper: str = "") -> str:
    """Run it in a cgroup that may have memory limits."""
    cgroup = "/sys/fs/cgroup/trial"
    return run(kernel, f"mkdir {cgroup} && cd {REPOSITORY} && {wrapper}.venv/bin/python -m {module} {cgroup}")


if __name__ == "__main__":
    sys.exit(main())
