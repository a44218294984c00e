"""Asks the agent at its CNI socket, as the plugin does."""

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any, NamedTuple

from bpf.errors import SidestepError
from cni import protocol

ANSWER_SECONDS = 3.0  # to wait for an answer; a timeout is a fault like any other
_UCRED = struct.Struct("3i")
_NO_ANSWER = f"no answer within {ANSWER_SECONDS:g} s"
# environment variable: what a process that starts others has found out, so that each of them does not wait anew
_SILENT = "SIDESTEP_SILENT_AGENT"


class Asked(NamedTuple):
    """The agent's answer. `pid` is who listens (None: nobody that can be seen); `fault` is "" if the answer is good."""

    pid: int | None
    output: dict[str, Any]
    fault: str

    @property
    def is_silent(self) -> bool:
        """Whether somebody listens and has not answered in time."""
        return self.fault == _NO_ANSWER


class Told(NamedTuple):
    """What only the agent knows; empty if it does not tell, and then `unknown` says where it was asked, and why."""

    rows: list[Any]
    unknown: str


def ask_about(run_dir: Path, what: protocol.Asked) -> Told:
    """Ask the agent that serves this directory for a list that it keeps."""
    return told_about(run_dir, what, ask_agent(run_dir, protocol.Question(command=what).model_dump()))


def told_about(run_dir: Path, what: protocol.Asked, asked: Asked) -> Told:
    """The same of an agent that was asked already."""
    unknown = f"{run_dir / protocol.SOCKET_NAME}: {asked.fault}" if asked.fault else ""
    return Told([] if unknown else asked.output.get(protocol.ANSWERS[what], []), unknown)


def silence(run_dir: Path, asked: Asked) -> dict[str, str]:
    """The environment of a process that is not to ask a silent agent again; {} if the agent is not silent."""
    return {_SILENT: json.dumps([str(run_dir), asked.pid])} if asked.is_silent else {}


def found_silent(run_dir: Path) -> Asked | None:
    """What the process that has started this one found, if that is a silent agent at the same directory."""
    directory, pid = json.loads(os.environ.get(_SILENT, '["", null]'))
    return Asked(pid, {}, _NO_ANSWER) if directory == str(run_dir) else None


def ask_agent(run_dir: Path, question: dict[str, Any], seconds: float = ANSWER_SECONDS) -> Asked:
    """Send one message to the agent that serves this directory, and wait so many seconds for its answer.

    If it is known to be silent, it is not asked.
    """
    if known := found_silent(run_dir):
        return known
    pid = None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        try:
            connection.connect(str(run_dir / protocol.SOCKET_NAME))
            # 0 if the process is in a PID namespace that cannot be seen from here
            pid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0] or None
            connection.sendall(protocol.encode(question))
            answer = json.loads(protocol.receive_message(connection)[0])
        except (FileNotFoundError, ConnectionRefusedError):
            return Asked(None, {}, "nobody is there")
        except TimeoutError:
            return Asked(pid, {}, f"no answer within {seconds:g} s")
        except (OSError, ValueError, SidestepError) as error:
            return Asked(pid, {}, str(error))
    output = answer.get("output") or {}
    return Asked(pid, output, "" if answer.get("exit") == 0 else str(output.get("msg")))
