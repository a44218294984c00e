"""How `sidestep` ends: one clear line, the right exit status, and a traceback for nobody but a bug report."""

import fcntl
import os
import re
import signal
import stat
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path
from typing import IO

import pytest

from installer import VERSION
from installer.commands import ending
from installer.commands.crash_files import CrashFiles
from tests.lab.invocation import sidestep_by_user
from tests.lab.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
LIMIT = 60
# `sidestep probe` with a bug in it: the code that is given, in the place of what it should do
BROKEN_PROBE = """
import sys, threading
from installer.commands import cli
from installer.probe import examine

def fail():
    1 / 0

def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    sys.exit(1)

broken, *options = sys.argv[1:]
examine.examine_programs = lambda *_: eval(broken)
sys.argv = ["sidestep", "probe", *options]
cli.main()
"""


def sidestep(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    return subprocess.run([REPOSITORY / "sidestep", *argv], env=env, capture_output=True, text=True, timeout=LIMIT)


def ended(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a command of which only the way it ends matters."""
    code = f"import signal, sys, time; from installer.commands import ending; sys.exit(ending.run_command({command}))"
    env = os.environ | environment
    argv = [sys.executable, "-c", code]
    return subprocess.run(argv, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=LIMIT)


def waiting_in(pipe: IO[str]) -> int:
    """Bytes that have been written and not read."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def interrupt_until_it_ends(process: "subprocess.Popen[str]") -> None:
    """As somebody who presses Ctrl-C again; signals that come too fast would be one."""

    def has_ended() -> bool:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        return process.poll() is not None

    wait_until(has_ended, "the process to end", LIMIT)


def one_line(text: str) -> str:
    assert text.startswith("sidestep: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    return text


def test_the_command_is_the_projects() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"sidestep": "installer.commands.cli:main"}
    done = sidestep("--version")
    assert (done.returncode, done.stdout) == (0, f"sidestep {VERSION}\n")


def test_it_can_be_called_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "sidestep").symlink_to(REPOSITORY / "sidestep")
    (tmp_path / "installer").mkdir()
    (tmp_path / "click.py").write_text("raise SystemExit('somebody else is root now')")
    done = subprocess.run(["./sidestep", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sidestep {VERSION}\n", "")


def test_wrong_usage_is_one_line_and_2() -> None:
    done = sidestep("attach", "--nope")  # other mistakes are in tests/unit/test_cli_mistakes.py
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done.stderr).endswith("No such option '--nope'; see sidestep attach --help\n")


@pytest.mark.claim("It has no contents of maps and no environment")
@pytest.mark.claim("An internal error of a command leaves a file")
def test_an_unforeseen_error_is_one_line_and_a_file(tmp_path: Path) -> None:
    done = ended("lambda: 1 / 0", TMPDIR=str(tmp_path), PASSWORD="of somebody's")
    assert done.returncode == 1
    said = one_line(done.stderr)
    assert said.startswith("sidestep: internal error: ZeroDivisionError: division by zero; please report it with the ")
    file = Path(said.strip().rpartition(" ")[2])
    try:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        report = file.read_text()
    finally:
        file.unlink()
    assert report.startswith(f"sidestep {VERSION}\nkernel   Linux {os.uname().release}")
    assert report.endswith("ZeroDivisionError: division by zero\n")
    assert "Traceback" in report
    assert "of somebody's" not in report


def test_the_file_is_in_the_run_directory_of_the_environment(tmp_path: Path) -> None:
    done = ended("lambda: 1 / 0", CNI_AGENT_RUN_DIR=str(tmp_path))
    (file,) = tmp_path.iterdir()
    assert one_line(done.stderr).endswith(f"please report it with the file {file}\n")


@pytest.mark.parametrize("broken", ["fail()", "in_thread(fail)"])
def test_the_file_is_in_the_run_directory_of_the_option(tmp_path: Path, broken: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_PROBE, broken, "--cni-agent-run-dir", tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    (file,) = tmp_path.iterdir()
    assert one_line(done.stderr).endswith(f"please report it with the file {file}\n")


def test_an_error_in_a_thread_is_one_line_too(tmp_path: Path) -> None:
    command = "lambda: __import__('threading').Thread(target=lambda: 1 / 0).start() or 0"
    done = ended(command, TMPDIR=str(tmp_path))
    said = one_line(done.stderr)
    Path(said.strip().rpartition(" ")[2]).unlink()
    assert "ZeroDivisionError" in said


def test_an_error_that_nobody_can_catch_is_one_line_and_told_once(tmp_path: Path) -> None:
    call = "__import__('ctypes').CFUNCTYPE(None)(lambda: 1 / 0)"
    done = ended(f"lambda: [{call}() for _ in range(3)] and 0", TMPDIR=str(tmp_path))
    assert done.returncode == 0
    said = one_line(done.stderr)
    Path(said.strip().rpartition(" ")[2]).unlink()
    assert said.startswith("sidestep: internal error: ZeroDivisionError: division by zero; please report it with the ")


def test_ctrl_c_where_nobody_can_catch_it_is_no_error() -> None:
    done = ended("lambda: __import__('ctypes').CFUNCTYPE(None)(lambda: signal.raise_signal(2))() or 0")
    assert (done.returncode, done.stderr) == (0, "")


def test_whoever_wants_it_sees_the_traceback() -> None:
    done = ended("lambda: 1 / 0", SIDESTEP_DEBUG="1")
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("division by zero; please report it with the traceback above\n")


def test_without_room_for_a_file_the_user_is_told_how_to_see_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    nowhere = CrashFiles(tmp_path / "none")
    words = ending.last_words(ValueError("no"), nowhere)
    assert "please report it with the traceback that SIDESTEP_DEBUG=1 shows" in words


def test_the_run_directory_keeps_the_last_ten(tmp_path: Path) -> None:
    told = [ending.last_words(ValueError(str(number)), CrashFiles(tmp_path)) for number in range(13)]
    left = sorted(tmp_path.iterdir())
    assert [str(each) for each in left] == sorted(said.rpartition(" ")[2] for said in told[3:])


def test_a_missing_library_is_named_with_its_package(tmp_path: Path) -> None:
    (tmp_path / "libbpf.so.1").touch()
    for argv in (("status", "--bpffs", "/never"), ("probe",)):
        done = sidestep(*argv, LD_LIBRARY_PATH=str(tmp_path))
        assert done.returncode == 1
        assert "libbpf.so.1" in one_line(done.stderr)
        assert "install libbpf 1.0 or newer: the package libbpf1 on Debian" in done.stderr
    assert sidestep("status", "--help", LD_LIBRARY_PATH=str(tmp_path)).returncode == 0


def test_a_missing_package_of_pythons_is_named() -> None:
    done = ended("lambda: sys.modules.update(rich=None) or __import__('rich')")
    assert (done.returncode, done.stderr) == (
        1,
        "sidestep: the Python package rich is missing; `make setup` installs all that is needed\n",
    )


def test_ctrl_c_is_130_without_a_word() -> None:
    code = (
        "import sys, time; from installer.commands import ending\n"
        "sys.exit(ending.run_command(lambda: print('ready', flush=True) or time.sleep(60)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT)
    assert (process.returncode, said) == (130, "")


def test_ctrl_c_twice_does_not_wait_for_a_reader_that_does_not_read() -> None:
    code = (
        "import sys; from installer.commands import ending\n"
        "sys.stderr.write('ready\\n')\n"
        "sys.exit(ending.run_command(lambda: print('x' * (1 << 20)) or 0))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        output = process.stdout
        wait_until(lambda: waiting_in(output) > 0, "the pipe to fill", LIMIT)
        interrupt_until_it_ends(process)
        assert (process.returncode, process.stderr.read()) == (130, "")


@pytest.mark.parametrize("argv", [("--help",), ("completion", "bash")])
def test_a_reader_that_has_gone_is_no_error(argv: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        done = subprocess.run([REPOSITORY / "sidestep", *argv], stdout=gone, stderr=subprocess.PIPE, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_peer_that_has_gone_is_one() -> None:
    done = ended("lambda: (_ for _ in ()).throw(BrokenPipeError(32, 'Broken pipe'))", SIDESTEP_DEBUG="1")
    assert done.returncode == 1
    assert "internal error: BrokenPipeError" in done.stderr


def test_output_that_cannot_be_written_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        argv = [str(REPOSITORY / "sidestep"), "agent", "--help"]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (
        1,
        "sidestep: the output: No space left on device; make room, or write elsewhere\n",
    )


def test_anybody_may_read_help() -> None:
    """Also who may not run the command."""
    asked = (("attach",), ("attach", "--help"), ("attach", "--nope"))
    done = [sidestep_by_user(*argv) for argv in asked]
    assert [each.returncode for each in done] == [1, 0, 2]
    assert re.match(r"sidestep: running as uid \d+; run as root with CAP_BPF", done[0].stderr)
