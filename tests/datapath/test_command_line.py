"""`sidestep` as an operator types it: what it says, its exit status, and that no mistake ends in a traceback."""

import signal
import subprocess
import sys
from pathlib import Path

import yaml

from tests.datapath.wires import scratch_pins
from tests.lab.invocation import REPOSITORY, sidestep, sidestep_by_user
from tests.lab.waiting import wait_until


def test_attach_twice_then_detach_twice() -> None:
    with scratch_pins() as (pins, cgroup):
        options = ("--bpffs", pins.bpffs, "--cgroup", cgroup)
        first, second = sidestep("attach", *options), sidestep("attach", *options)
        assert first.stdout == f"attached: programs at {cgroup}, pins in {pins.root}\n"
        assert second.stdout == f"unchanged: programs at {cgroup}, pins in {pins.root}\n"
        assert pins.top.stat().st_mode & 0o777 == 0o700
        assert "removed" in sidestep("detach", "--bpffs", pins.bpffs).stdout
        again = sidestep("detach", "--bpffs", pins.bpffs)
        assert (again.returncode, again.stdout) == (0, "nothing was attached\n")


def test_what_is_done_is_told_to_programs_too() -> None:
    with scratch_pins() as (pins, cgroup):
        at = ("--bpffs", pins.bpffs, "--cgroup", cgroup)

        def told(command: str, *argv: object, output: str = "json") -> object:
            done = sidestep(command, *argv, "--output", output)
            assert (done.returncode, done.stderr) == (0, "")
            return yaml.safe_load(done.stdout)

        place = {"attach_point": str(cgroup), "further_places": []}
        attached = {"outcome": "attached", **place, "pins": str(pins.root), "restored": []}
        assert told("attach", *at) == attached
        assert told("attach", *at, output="yaml") == attached | {"outcome": "unchanged"}
        assert told("accelerate", "off", *at) == {"level": "off", "wanted": "off", "reason": ""}
        detached = {"was_attached": True, "pins": str(pins.top), "lost_capture": []}
        assert told("detach", "--bpffs", pins.bpffs) == detached
        assert told("detach", "--bpffs", pins.bpffs, output="yaml")["was_attached"] is False  # type: ignore[index]


def test_root_without_capabilities_is_told_which() -> None:
    with scratch_pins() as (pins, cgroup):
        dropped = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
        command = [sys.executable, "-m", "installer", "attach", "--bpffs", str(pins.bpffs), "--cgroup", str(cgroup)]
        done = subprocess.run([*dropped, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (
            1,
            "sidestep: without CAP_SYS_ADMIN nothing can be attached; run as root with all capabilities, "
            "or add SYS_ADMIN to the container's capabilities\n",
        )


def test_the_agent_ends_in_an_orderly_way_at_ctrl_c(tmp_path: Path) -> None:
    with scratch_pins() as (pins, cgroup):
        # the self-test of acceleration would go on for a moment, in a cgroup of its own
        places = (
            "--bpffs",
            pins.bpffs,
            "--cgroup",
            cgroup,
            "--pods",
            tmp_path,
            "--cni-agent-run-dir",
            tmp_path / "run",
        )
        rest = ("--monitoring-port", "0", "--health-port", "0", "--acceleration", "off")
        argv = [sys.executable, "-m", "installer", "agent", *map(str, places + rest)]
        with subprocess.Popen(argv, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
            try:
                wait_until(lambda: (tmp_path / "run" / "cni.sock").exists(), "the agent serves", 60)
            finally:
                agent.send_signal(signal.SIGINT)
            said = "".join(agent.communicate(timeout=60))
        assert agent.returncode == 0
        assert "Traceback" not in said


def test_a_cgroup_that_is_none_is_named() -> None:
    with scratch_pins() as (pins, _):
        done = sidestep("attach", "--bpffs", pins.bpffs, "--cgroup", "/tmp")
        assert done.returncode == 1
        assert done.stderr == "sidestep: bpf_link_create(/tmp): Bad file descriptor; give a cgroup2 directory\n"
        assert not pins.top.exists()


def test_a_run_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    with scratch_pins() as (pins, cgroup):
        (tmp_path / "file").touch()
        options = (
            "--bpffs",
            pins.bpffs,
            "--cgroup",
            cgroup,
            "--pods",
            tmp_path,
            "--cni-agent-run-dir",
            tmp_path / "file",
        )
        done = sidestep("agent", *options)
        assert done.returncode == 1
        assert f"run directory {tmp_path}/file" in done.stderr
        assert "Traceback" not in done.stderr


def test_only_root_may() -> None:
    done = sidestep_by_user("attach")
    assert (done.returncode, done.stderr) == (
        1,
        "sidestep: running as uid 1000; run as root with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN\n",
    )
