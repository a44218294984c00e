"""Completion in real shells, and that it costs neither root nor the imports of what isn't run."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from installer.commands.cli import COMMANDS
from tests.lab.invocation import sidestep_by_user

REPOSITORY = Path(__file__).parents[2]
LIMIT = 60
# what takes long to import, or may not be there where only completion or --help is wanted
SLOW = (
    "bcc",
    "jinja2",
    "kubernetes",
    "prometheus_client",
    "pydantic",
    "pyroute2",
    "rich",
    "structlog",
    "textual",
    "yaml",
)
ENVIRONMENT = {"PATH": f"{REPOSITORY}:/usr/bin:/bin", "HOME": "/nonexistent", "TERM": "dumb", "LANG": "C.UTF-8"}


def script(shell: str) -> str:
    argv = [str(REPOSITORY / "sidestep"), "completion", shell]
    return subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=True).stdout


def completed(*words: str) -> list[str]:
    """What bash would offer for the last word."""
    line = " ".join(f"'{each}'" for each in words)
    run = f"""
        COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}
        _sidestep_completion sidestep
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    argv = ["bash", "--norc", "-c", f"{script('bash')}\n{run}"]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("sidestep", ""), sorted(COMMANDS)),
        (("sidestep", "sta"), ["status"]),
        (("sidestep", "accelerate", ""), ["off", "proxy", "full"]),
        (("sidestep", "maps", "p"), ["passages", "pods", "port_rules", "proxies"]),
        (("sidestep", "status", "--output", ""), ["table", "wide", "json", "yaml"]),
        (("sidestep", "status", "--out"), ["--output"]),
        (("sidestep", "completion", "z"), ["zsh"]),
        (("sidestep", "never", ""), sorted(COMMANDS)),
    ],
)
def test_bash(words: tuple[str, ...], offered: list[str]) -> None:
    assert completed(*words) == offered


def test_fish() -> None:
    run = f"{script('fish')}\ncomplete -C 'sidestep sta'; complete -C 'sidestep accelerate '"
    argv = ["fish", "--no-config", "-c", run]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["status", "full", "off", "proxy"]


def test_zsh(tmp_path: Path) -> None:
    """zsh completes only where somebody types: in a terminal."""
    (tmp_path / ".zshrc").write_text("PS1='> '; autoload -U compinit; compinit -u -D; source ./script\n")
    (tmp_path / "script").write_text(script("zsh"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-i"], ENVIRONMENT | {"ZDOTDIR": str(tmp_path)})
    try:
        _until(terminal, "> ")
        os.write(terminal, b"sidestep accel\t")
        assert "accelerate" in _until(terminal, "accelerate ")
        os.write(terminal, b"pro\t")
        _until(terminal, "xy ")
        os.write(terminal, b"\x15exit\n")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def _until(terminal: int, wanted: str) -> str:
    """What the terminal shows, up to something."""
    seen, end = "", time.monotonic() + LIMIT
    while wanted not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen):
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_asking_for_a_command_imports_nothing_slow(name: str) -> None:
    code = f"import sys; from installer.commands.cli import cli; cli.get_command(None, {name!r}); print(*sys.modules)"
    argv = [sys.executable, "-c", code]
    loaded = subprocess.run(
        argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT, check=True
    ).stdout.split()
    assert set(SLOW) & {each.partition(".")[0] for each in loaded} == set()
    assert "bpf.syscalls" not in loaded, "loads libbpf"


def test_nobody_special_may_complete() -> None:
    asked = {"_SIDESTEP_COMPLETE": "bash_complete", "COMP_WORDS": "sidestep att", "COMP_CWORD": "1"}
    done = sidestep_by_user(environment=asked)
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,attach\n", "")
    done = sidestep_by_user("completion", "bash")
    assert (done.returncode, done.stderr) == (0, "")
