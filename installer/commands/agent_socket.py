"""Asks the agent at its CNI socket, as the plugin does."""

import json
import socket
import struct
from pathlib import Path
from typing import Any, NamedTuple

from bpf.errors import SidestepError
from cni import protocol

ANSWER_SECONDS = 3.0  # to wait for an answer; a timeout is a fault like any other
_UCRED = struct.Struct("3i")


class Asked(NamedTuple):
    """The agent's answer. `pid` is who listens (None: nobody that can be seen); `fault` is "" if the answer is good."""

    pid: int | None
    output: dict[str, Any]
    fault: str


class Told(NamedTuple):
    """What only the agent knows; empty if it does not tell, and then `unknown` says where it was asked, and why."""

    rows: list[Any]
    unknown: str


def ask_about(run_dir: Path, what: protocol.Asked) -> Told:
    """Ask the agent that serves this directory for a list that it keeps."""
    asked = ask_agent(run_dir, protocol.Question(command=what).model_dump())
    unknown = f"{run_dir / protocol.SOCKET_NAME}: {asked.fault}" if asked.fault else ""
    return Told([] if unknown else asked.output.get(protocol.ANSWERS[what], []), unknown)


def ask_agent(run_dir: Path, question: dict[str, Any]) -> Asked:
    """Send one message to the agent that serves this directory, and wait for its answer."""
    pid = None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        try:
            connection.connect(str(run_dir / protocol.SOCKET_NAME))
            # 0 if the process is in a PID namespace that cannot be seen from here
            pid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0] or None
            connection.sendall(protocol.encode(question))
            answer = json.loads(protocol.receive_message(connection)[0])
        except (FileNotFoundError, ConnectionRefusedError):
            return Asked(None, {}, "nobody is there")
        except TimeoutError:
            return Asked(pid, {}, f"no answer within {ANSWER_SECONDS:g} s")
        except (OSError, ValueError, SidestepError) as error:
            return Asked(pid, {}, str(error))
    output = answer.get("output") or {}
    return Asked(pid, output, "" if answer.get("exit") == 0 else str(output.get("msg")))
