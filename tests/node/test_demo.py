"""`make demo` as its user runs it: the last line, the exit status, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bpf.kernel import cgroup2_root, mounts
from tests.lab.node import LABS, NETNS, REPOSITORY, remove
from tests.lab.waiting import wait_until

DEMO = [sys.executable, "-m", "tests.lab.demo"]


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DEMO, *options],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C goes to the whole group
    )


def lab_of(output: str) -> str:
    found = re.search(r"^demo: node (\w{6})", output, re.M)
    assert found is not None, output
    return found[1]


def leftovers(lab: str) -> list[str]:
    found = [str(path) for path in (LABS / lab, cgroup2_root() / f"sidestep-lab-{lab}") if path.exists()]
    found += [str(path) for path in NETNS.glob(f"sidestep-{lab}-*")]
    found += [str(mount.path) for mount in mounts() if lab in str(mount.path)]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if lab in process.read_text():
                found.append(process.read_text())
        except OSError:
            continue
    return found


def test_it_says_as_expected_and_leaves_nothing() -> None:
    demo = start()
    output = demo.communicate(timeout=60)[0]
    assert demo.returncode == 0, output
    assert output.splitlines()[-1] == "demo: 18 of 18 as expected"
    assert leftovers(lab_of(output)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["mesh pod with Envoy alpha", "received by"])
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals, moment: str) -> None:
    demo = start()
    assert demo.stdout is not None
    output = ""
    while moment not in output:
        output += demo.stdout.readline()
    if number == signal.SIGINT:
        os.killpg(demo.pid, number)
    else:
        demo.send_signal(number)
    output += demo.communicate(timeout=60)[0]
    assert demo.returncode != 0
    assert "Traceback" not in output
    assert leftovers(lab_of(output)) == []


def test_a_kept_mesh_can_be_looked_at_and_removed() -> None:
    demo = start("--keep")
    output = demo.communicate(timeout=60)[0]
    lab = lab_of(output)
    try:
        assert demo.returncode == 0, output
        assert output.splitlines()[-1] == "demo: 18 of 18 as expected"
        hint = re.search(r"remove it: +(\S.*)$", output, re.M)
        assert hint is not None
        asked = re.search(r"a request from alpha: +(.*)$", output, re.M)
        assert asked is not None
        seen = subprocess.run(asked[1], shell=True, capture_output=True, text=True, timeout=20)
        assert '"pod": "beta"' in seen.stdout, seen
        subprocess.run(hint[1], shell=True, check=True, cwd=REPOSITORY, timeout=60)
        assert leftovers(lab) == []
    finally:
        if leftovers(lab):
            remove(lab)


def test_a_demo_that_was_killed_is_cleaned_up_by_the_next_clean() -> None:
    demo = start()
    assert demo.stdout is not None
    output = ""
    while "mesh pod with Envoy alpha" not in output:
        output += demo.stdout.readline()
    demo.kill()
    demo.wait()
    time.sleep(0.1)
    lab = lab_of(output)
    assert leftovers(lab) != []
    subprocess.run([sys.executable, "-m", "tests.lab.clean", lab], check=True, cwd=REPOSITORY, timeout=60)
    wait_until(lambda: leftovers(lab) == [], "the lab to be gone")
