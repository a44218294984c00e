"""Mistakes on the command line: one line says what is wrong and where to read on, and the exit status is 2.

The commands run in this process, up to where they would look at the machine.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from bpf.errors import KernelRefused
from installer.commands import cli, ending
from tests.lab.invocation import REPOSITORY

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Said:
    """Runs a command: its exit status, what it prints, and what it says of itself."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # a command sets both
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sidestep", *argv])
        status = ending.run_command(cli._run)
        printed, told = capfd.readouterr()
        return status, printed, told

    return run


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("frobnicate", "No such command 'frobnicate'; see sidestep --help"),
        ("statsu", "No such command 'statsu'. Did you mean 'status'? see sidestep --help"),
        # a command with settings, one without, and one of a folder of its own
        ("attach --nope", "No such option '--nope'; see sidestep attach --help"),
        ("completion bash --nope", "No such option '--nope'; see sidestep completion --help"),
        ("maps --nope", "No such option '--nope'; see sidestep maps --help"),
        ("attach here", "Got unexpected extra argument (here); see sidestep attach --help"),
        ("maps pods one two", "Got unexpected extra arguments (one two); see sidestep maps --help"),
        ("attach --bpffs", "Option '--bpffs' requires an argument; see sidestep --help"),
        ("accelerate", "Choose from: off, proxy, full; see sidestep accelerate --help"),
        # each type of value once, as an argument, an option, a setting
        ("accelerate fast", "'fast' is not one of 'off', 'proxy', 'full'; see sidestep accelerate --help"),
        ("status --output xml", "'xml' is not one of 'table', 'wide', 'json', 'yaml'; see sidestep status --help"),
        ("agent --pods / --log-level loud", "'loud' is not one of"),
        ("agent --pods /never", "'/never' does not exist"),
        ("status --health-port http", '"http" is not a port; ports are 0–65535'),
        ("explain alpha --inbound 192.0.2.1 --port 65536", '"65536" is not a port; ports are 0–65535'),
        ("maps --limit 0", "0 is not in the range x>=1"),
        ("explain alpha 10.0.0.1:80 --uid 4294967295", "4294967295 is not in the range 0<=x<=4294967294"),
        ("explain alpha 10.0.0.1:80 --mark 4294967296", "4294967296 is not in the range 0<=x<=4294967295"),
        # destinations: no address, no port, a port too large, an address of IPv6 without brackets
        (
            "explain alpha --inbound example.com",
            '"example.com" is not an IP address; names are not looked up, so give the address',
        ),
        ("explain alpha Example", "give ADDRESS:PORT, [IPV6]:PORT or POD:PORT"),
        ("explain alpha beta:80000", '"beta:80000" has port 80000; ports are 0–65535'),
        ("explain alpha 10.0.0.1:53/tcp --udp", "says tcp, and --udp says otherwise"),
        ("explain alpha 10.0.0.1:99999", '"10.0.0.1:99999" has port 99999; ports are 0–65535'),
        ("explain alpha fd00::1:80", "give ADDRESS:PORT, [IPV6]:PORT or POD:PORT"),
        ("explain alpha --inbound somewhere", '--inbound: "somewhere" is not an IP address'),
        ("explain alpha 10.0.0.1:80 --source here", '--source: "here" is not an IP address'),
        # options that need each other, or exclude each other
        ("trace --last 3 --port 80", "--last goes with POD, --verdict and --direction alone"),
        ("trace --not", "--not needs a filter: without one it leaves out all events"),
        ("trace --rule O99", 'there is no rule "O99"; the rules are O0, O1,'),
        ("explain alpha", "give either DEST or --inbound FROM"),
        ("explain alpha 10.0.0.1:80 --inbound 10.0.0.2", "give either DEST or --inbound FROM"),
        ("explain alpha 10.0.0.1:80 --port 80", "--port needs --inbound"),
        ("explain alpha 10.0.0.1:80 --port 0", "--port needs --inbound"),
        ("explain alpha --inbound 10.0.0.2 --uid 0", "--uid needs DEST, and not --inbound"),
        ("explain alpha 10.0.0.1:80 --as-proxy --uid 5", "give either --as-proxy or --uid and --gid"),
        ("explain alpha --inbound 10.0.0.2 --try", "give --port with --try or --udp"),
    ],
)
def test_wrong_usage_is_one_line_and_2(said: Said, argv: str, message: str) -> None:
    status, printed, told = said(*argv.split())
    assert (status, printed) == (2, "")
    assert message in told
    assert told.startswith("sidestep: ") and told.endswith("--help\n") and told.count("\n") == 1


@pytest.mark.parametrize("what", ["10.0.0.0/33", "example.com:80", "10.0.0.1:http", ":99999", ":", ""])
def test_a_destination_to_trace_that_cannot_be_understood(said: Said, what: str) -> None:
    words = (
        f'"{what}" is not a destination; give 10.0.0.0/8, 10.1.2.3:80, [fd00::1]:80 or :80; see sidestep trace --help'
    )
    assert said("trace", "--dest", what) == (2, "", f"sidestep: Invalid value for '--dest': {words}\n")


def test_a_wrong_setting_in_the_environment_is_named(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDESTEP_RECONCILE_SECONDS", "never")
    status, _, told = said("agent")
    assert (status, told.count("\n")) == (2, 1)
    assert "SIDESTEP_RECONCILE_SECONDS" in told


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("argv", ["version", "--help", "kubectl-plugin", "maps --nope"])
def test_a_closed_stream_is_no_fault(closed: str, argv: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m installer {argv} {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if "--nope" in argv else 0), done
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr


def test_no_command_is_help_and_2(said: Said) -> None:
    status, _, told = said()
    assert status == 2
    assert told.startswith("Usage: sidestep ")


def test_help_lists_every_command(said: Said) -> None:
    listed = set(re.findall(r"^  ([a-z-]+)  ", said("--help")[1], flags=re.M))
    assert set(cli.COMMANDS) <= listed


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - set(cli._WITHOUT_ROOT)))
def test_who_is_not_root(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    callback = cli._command(command).callback
    assert callback is not None
    with pytest.raises(KernelRefused, match="running as uid 1000; run as root with CAP_BPF, CAP_NET_ADMIN and"):
        callback()
