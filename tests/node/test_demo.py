"""`make demo` as its user runs it: the last line, the exit status, and nothing left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bpf.kernel import cgroup2_root, mounts
from tests.lab.clean import abandoned
from tests.lab.node import KEPT, LABS, NETNS, REPOSITORY, remove
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
        export = re.search(r"^  (export .*)$", output, re.M)
        assert export is not None
        hints = dict(re.findall(r"^  (\S[^:]*): +(\S.*)$", output[export.end() :], re.M))
        assert next(iter(hints)) == "a request from alpha"
        seen = typed(export[1], hints["a request from alpha"])
        assert '"pod": "beta"' in seen.stdout, seen
        log = LABS / lab / "alpha" / "connections.log"
        wait_until(lambda: log.read_text().count('"listener":"outbound"') > captured_by_the_demo(output), "its line")
        well = typed(export[1], hints["is all well?"])
        assert (well.returncode, well.stdout.partition(":")[0]) == (0, "OK"), well.stdout
        assert " alpha " in typed(export[1], hints["the pods"]).stdout
        assert "as explained" in typed(export[1], hints["the whole way"]).stdout
        traced = typed(export[1], hints["what happens"].replace("--follow", "--seconds 0.5"))
        assert (traced.returncode, traced.stderr.splitlines()[0]) == (0, "tracing")
        (REPOSITORY / "build").mkdir(exist_ok=True)
        page = typed(export[1], hints["a page about it"].replace("node.html", "build/demo.html"))
        assert (page.returncode, page.stdout) == (0, "report: build/demo.html\n")
        (REPOSITORY / "build" / "demo.html").unlink()
        assert typed(export[1], "./sidestep top").stderr.startswith("sidestep: top needs a terminal")
        assert lab in abandoned()  # this checkout's, so that its `make clean` removes it
        typed(export[1], hints["remove it"])
        assert leftovers(lab) == []
    finally:
        if leftovers(lab):
            remove(lab)


def typed(export: str, command: str) -> subprocess.CompletedProcess[str]:
    """As in the checkout's folder after the `export` line."""
    return subprocess.run(
        f"{export}\n{command}", shell=True, capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )


def captured_by_the_demo(output: str) -> int:
    """How many of the demo's own connections alpha's proxy has taken outbound."""
    return sum("alpha/15001" in line for line in output.splitlines())


def test_a_kept_lab_of_another_checkout_stays_when_this_one_is_cleaned() -> None:
    lab = LABS / "ffff00"
    lab.mkdir(parents=True)
    try:
        (lab / "owner").write_text("kept /another/checkout")
        assert lab.name not in abandoned()
        (lab / "owner").write_text(KEPT)
        assert lab.name in abandoned()
        (lab / "owner").write_text("1 never")  # a process id that is used again
        assert lab.name in abandoned()
    finally:
        shutil.rmtree(lab)


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
