"""The plugin's DEL beside an agent that hangs."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_shim_alone import CASES, config, run

pytestmark = pytest.mark.usefixtures("shim")


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[socket.socket]:
    """An agent that takes connections, as far as the kernel goes, and never answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "cni.sock"))
        listener.listen()
        yield listener


@pytest.mark.parametrize("case", ["the agent's own pod", "a plain pod"])
def test_what_starts_without_an_agent_ends_without_it_too_but_the_agent_is_told(
    hung: socket.socket, tmp_path: Path, case: str
) -> None:
    args, annotations, _ = CASES[case]
    done = run("DEL", args, config(annotations, tmp_path) | {"agent_timeout_seconds": 60})
    assert (done.returncode, done.stdout) == (0, "")
    assert "did not answer within 1 s" in done.stderr  # rather than the 60 that others are given
    with hung.accept()[0] as connection, connection.makefile("rb") as told:
        assert b'"command":"DEL"' in told.read()
