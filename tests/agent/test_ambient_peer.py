"""By which process id the agent knows a ztunnel that has connected."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from installer.ambient.peer import PeerUnknown, pid_of
from tests.lab.node import REPOSITORY

# as an agent in a container of its own, whose procfs of the node is another than its own
_ELSEWHERE = """
import socket, sys
from pathlib import Path
from installer.ambient.peer import PeerUnknown, pid_of
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
with listener.accept()[0] as peer:
    sys.stdin.readline()
    try:
        print(pid_of(peer, Path("/proc")), flush=True)
    except PeerUnknown as error:
        print(error, flush=True)
"""


def test_an_agent_that_sees_the_nodes_process_ids_has_it_from_the_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.connect(str(tmp_path / "s"))
            with listener.accept()[0] as peer:
                assert pid_of(peer, Path("/proc")) == os.getpid()


def test_an_agent_with_process_ids_of_its_own_has_it_from_the_nodes_procfs(tmp_path: Path) -> None:
    with _agent_elsewhere(tmp_path) as agent, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        assert agent.stdin and agent.stdout and agent.stdout.readline() == "ready\n"
        other.connect(str(tmp_path / "s"))
        out, _ = agent.communicate("\n", timeout=10)
        assert out.strip() == str(os.getpid())


def test_a_process_that_has_ended_is_not_taken_for_another(tmp_path: Path) -> None:
    connect = "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])"
    with _agent_elsewhere(tmp_path) as agent:
        assert agent.stdin and agent.stdout and agent.stdout.readline() == "ready\n"
        subprocess.run([sys.executable, "-c", connect, str(tmp_path / "s")], check=True)
        out, _ = agent.communicate("\n", timeout=10)
        assert "has ended already" in out or "can't be looked at" in out


def test_what_is_no_socket_of_a_process_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "stat").write_text("1 (x) S")
    with socket.socket(socket.AF_INET) as none, pytest.raises(PeerUnknown, match="set hostPID: true"):
        pid_of(none, tmp_path)


def _agent_elsewhere(tmp_path: Path) -> "subprocess.Popen[str]":
    argv = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", _ELSEWHERE, str(tmp_path / "s")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process: subprocess.Popen[str] = subprocess.Popen(argv, cwd=REPOSITORY, **pipes)  # type: ignore[call-overload]
    return process
