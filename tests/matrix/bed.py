"""The mesh of the matrix: a client's and a server's pod on one node, with Envoys as istiod configures them."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tests.lab.istiod.identities import KeyKind, mesh_authority
from tests.lab.istiod.sent import with_port_like, with_tcp_service
from tests.lab.levels import changing, redirected_bytes, set_level
from tests.lab.machine import acceleration_needed
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.matrix.building import built
from tests.matrix.software import Command, Place, Software, Way

# Now and then each connection goes by TCP. A connection that begins then does so to its end, so this is never for long.
CHANGING = "changing"
_CHANGES, _CHANGE_SECONDS = ("full", "full", "full", "off"), 0.05
_HERE = Path(__file__).parent
_START_SECONDS = 60  # of a server, on a machine on which much else is going on


class Outcome(StrEnum):
    """Of a client's calls."""

    RIGHT = "right"  # every byte is what it should be
    WRONG = "WRONG"
    BROKEN = "broken"  # a connection has ended, or an answer was an error
    HUNG = "hung"  # not done in time


@dataclass(frozen=True)
class Result:
    """What came of one case."""

    outcome: Outcome
    moved: int  # bytes that the client has compared
    redirected: int  # bytes that went past TCP, of both pods
    handshakes: int  # between the proxies
    said: str = ""  # the last line that it said, unless all is right
    log: str = ""  # all that it said


@dataclass(frozen=True)
class Bed:
    """Pods that allow every level."""

    node: Node
    client: Pod
    server: Pod
    programs: Path  # everything that runs in pods, where every user can go

    @contextmanager
    def at(self, level: str) -> Iterator[None]:
        """The node's level meanwhile. Envoys start anew: a connection that they keep would be of an earlier level."""
        with changing(self.node, _CHANGE_SECONDS, _CHANGES) if level == CHANGING else nullcontext():
            if level != CHANGING:
                set_level(self.node, level)
            for pod in (self.server, self.client):
                pod.envoy.stop()
                pod.envoy.start()
            yield

    @contextmanager
    def serving(self, software: Software, way: Way) -> Iterator[None]:
        """The server, until it listens. Raises RuntimeError if it ends, TimeoutError if it does not come."""
        directory = self.server.directory / f"{software.name}-{way.label}"
        directory.mkdir()
        command = software.server(Place(way.value, directory, self.programs, way is Way.FIRST))
        os.chown(directory, command.uid, command.uid)
        if "tls" in software.options:
            mesh_authority().issue(directory, "default", "server", command.uid)
        log = directory / "log"
        if command.before:
            self._run(command, command.before, log)
        with log.open("ab") as output:
            environment = {**os.environ, **command.env}
            process = self.server.popen(
                [*command.argv], command.uid, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )
        try:
            wait_until(lambda: self._listens(process, way, command, log), f"{software.name} to listen", _START_SECONDS)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # its children too; popen() has given it a session of its own
            process.wait()
            shutil.rmtree(directory)

    def call(self, software: Software, way: Way, seed: int, size: int, seconds: float) -> Result:
        """Run the client. It has `seconds`; afterwards it is killed."""
        client = software.client
        greeted = ("greeted",) if way is Way.FIRST and client.knows_greetings else ()
        words = [self.server.ip4, way.value, seed, size, *software.options, *greeted]
        before = self._redirected()
        process = self.client.popen(
            [*client.argv(self.programs), *map(str, words)],
            client.user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(self.programs)},
        )
        outcome, said, moved = Outcome.RIGHT, "", 0
        try:
            out, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            error = process.communicate()[1]
            outcome, said = Outcome.HUNG, f"after {seconds} s; {_end(error)}"
        else:
            if process.returncode:
                outcome, said = Outcome.WRONG if "AssertionError" in error else Outcome.BROKEN, _end(error)
            else:
                moved = json.loads(out)["bytes"]
        redirected, handshakes = self._redirected() - before, self.client.envoy.handshakes(way.value)
        return Result(outcome, moved, redirected, handshakes, said, error)

    def _redirected(self) -> int:
        return redirected_bytes(self.client) + redirected_bytes(self.server)

    def _run(self, command: Command, argv: Sequence[str | Path], log: Path) -> None:
        with log.open("ab") as output:
            process = self.server.popen([*argv], command.uid, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            if process.wait(_START_SECONDS):
                raise RuntimeError(f"{argv[0]}: {_end(log.read_text(errors='replace'))}")

    def _listens(self, process: "subprocess.Popen[bytes]", way: Way, command: Command, log: Path) -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{command.argv[0]} has ended: {_end(log.read_text(errors='replace'))}")
        argv = ["nsenter", f"--net={self.server.netns}", "ss", "-Hltn", f"sport = :{way.value}"]
        if not subprocess.run(argv, check=True, capture_output=True).stdout:
            return False
        if not command.ready:
            return True
        asked = self.server.popen([*command.ready], command.uid, stdout=subprocess.DEVNULL)
        return bool(asked.wait() == 0)


@contextmanager
def bed(compiled: Iterable[str]) -> Iterator[Bed]:
    """Everything up, with the compiled programs that are named; taken down on leaving."""
    node = Node()
    node.agent.options = ["--acceleration", "off"]  # the level is set for each case
    with acceleration_needed(), node:
        programs = node.directory / "programs"
        programs.mkdir()
        matrix = programs / "tests" / "matrix"  # a package by its own name, without what it is made of
        for folder in ("clients", "mirrors"):
            shutil.copytree(_HERE / folder, matrix / folder)
        for package in (matrix, matrix.parent):
            (package / "__init__.py").touch()
        for name in compiled:
            made = built(name)
            (shutil.copytree if made.is_dir() else shutil.copy)(made, programs / name)
        client, server = (_pod(node, name) for name in ("client", "server"))
        yield Bed(node, client, server, programs)


def _pod(node: Node, name: str) -> Pod:
    pod = node.pod(name, annotations={"sidestep.io/acceleration": "full"}, app=False, envoy=False)
    pod.envoy.key_kind, pod.envoy.amend = KeyKind.RSA, _with_services_ports
    return pod


def _with_services_ports(static: dict[str, Any]) -> None:
    with_tcp_service(static)
    with_port_like(static, Way.HTTP.value, Way.HTTP2.value, http2=True)


def _end(text: str) -> str:
    """The last line that says something, as errors have it; not what Python says when it takes objects apart."""
    lines = [line.strip() for line in text.partition("Exception ignored in")[0].splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was said"
