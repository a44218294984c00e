"""The shim by itself: what it takes, what it sends, what it prints.

A little server stands in for the agent, because the shim must also survive answers no agent gives.
"""

import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SHIM = Path(__file__).parents[2] / "build" / "sidestep-cni"
pytestmark = pytest.mark.usefixtures("shim")
NETNS = "/proc/self/ns/net"
CONFIG: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "name": "net",
    "type": "sidestep-cni",
    "prevResult": {"zebra": 1, "cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}], "big": 2**53 + 1, "é": None},
}
ENVIRONMENT = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": NETNS,
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
    "CNI_ARGS": "K8S_POD_NAME=pod;K8S_POD_NAMESPACE=default",
}


@dataclass(frozen=True)
class Outcome:
    """How an invocation ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> dict[str, Any]:
        """The CNI error object, which must be all there is on stdout."""
        assert self.status == 1, self
        error: dict[str, Any] = json.loads(self.stdout)
        assert self.stdout.count("\n") == 1
        assert {"cniVersion", "code", "msg"} <= set(error)
        assert error["msg"] in self.stderr
        return error


@dataclass
class Agent:
    """Answers every connection with `answer`; keeps the requests and the inodes of the descriptors that came along."""

    directory: Path
    answer: Callable[[socket.socket], None]
    requests: list[dict[str, Any]] = field(default_factory=list)
    inodes: list[list[int]] = field(default_factory=list)

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with connection:
                data, descriptors, _, _ = socket.recv_fds(connection, 1 << 22, 4)
                (length,) = struct.unpack("!I", data[:4])
                while len(data) < length + 4:
                    data += connection.recv(1 << 22)
                self.requests.append(json.loads(data[4:]))
                self.inodes.append([os.fstat(descriptor).st_ino for descriptor in descriptors])
                for descriptor in descriptors:
                    os.close(descriptor)
                with suppress(OSError):
                    self.answer(connection)


def framed(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


def says(**answer: Any) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(framed(json.dumps(answer).encode()))


def sends(raw: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(raw)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    listener = socket.socket(socket.AF_UNIX)

    def start(answer: Callable[[socket.socket], None]) -> Agent:
        listener.bind(str(tmp_path / "cni.sock"))
        listener.listen()
        agent = Agent(tmp_path, answer)
        threading.Thread(target=agent.serve, args=(listener,), daemon=True).start()
        return agent

    yield start
    listener.close()


def run(
    directory: Path, stdin: bytes | None = None, config: Mapping[str, Any] | None = None, **variables: str
) -> Outcome:
    """The shim once; variables given as CNI_X="-unset-" are left out."""
    environment = {key: value for key, value in {**ENVIRONMENT, **variables}.items() if value != "-unset-"}
    text = {**CONFIG, "cni_agent_run_dir": str(directory), "agent_timeout_seconds": 5, **(config or {})}
    body = json.dumps(text).encode() if stdin is None else stdin
    done = subprocess.run([SHIM], input=body, env=environment, capture_output=True, timeout=20)
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace"))


def test_add_passes_the_invocation_and_the_namespace_as_a_descriptor(agent: Callable[..., Agent]) -> None:
    started = agent(says(exit=0, output=CONFIG["prevResult"]))
    outcome = run(started.directory)
    assert outcome.status == 0, outcome
    request = started.requests[0]
    assert request.pop("config") == {
        **CONFIG,
        "cni_agent_run_dir": str(started.directory),
        "agent_timeout_seconds": 5,
    }
    assert request == {
        "version": 1,
        "command": "ADD",
        "container_id": "c1",
        "ifname": "eth0",
        "netns": NETNS,
        "args": "K8S_POD_NAME=pod;K8S_POD_NAMESPACE=default",
    }
    assert started.inodes == [[Path(NETNS).stat().st_ino]]


def test_check_passes_the_namespace_and_status_and_gc_pass_none(agent: Callable[..., Agent]) -> None:
    started = agent(says(exit=0, output=None))
    for command in ("CHECK", "STATUS", "GC"):
        outcome = run(started.directory, config={"cniVersion": "1.1.0"}, CNI_COMMAND=command)
        assert outcome == Outcome(0, "", "")
    assert [request["command"] for request in started.requests] == ["CHECK", "STATUS", "GC"]
    assert started.inodes == [[Path(NETNS).stat().st_ino], [], []]


def test_status_and_gc_need_only_a_path(agent: Callable[..., Agent]) -> None:
    started = agent(says(exit=0, output=None))
    unset = dict.fromkeys(["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"], "-unset-")
    for command in ("STATUS", "GC"):
        assert run(started.directory, None, {"cniVersion": "1.1.0"}, CNI_COMMAND=command, **unset).status == 0
        request = started.requests[-1]
        assert [request[key] for key in ("container_id", "ifname", "netns", "args")] == [""] * 4


def test_the_answer_is_printed_as_it_came_and_nothing_else(agent: Callable[..., Agent]) -> None:
    started = agent(says(exit=0, output=CONFIG["prevResult"]))
    outcome = run(started.directory)
    assert list(json.loads(outcome.stdout)) == ["zebra", "cniVersion", "ips", "big", "é"]
    assert json.loads(outcome.stdout) == CONFIG["prevResult"]
    assert outcome.stderr == ""


def test_an_answer_without_output_prints_nothing(agent: Callable[..., Agent]) -> None:
    assert run(agent(says(exit=0, output=None)).directory, CNI_COMMAND="DEL") == Outcome(0, "", "")


def test_the_agents_error_object_is_printed_and_fails(agent: Callable[..., Agent]) -> None:
    error = {"cniVersion": "1.0.0", "code": 100, "msg": "bad annotation", "details": "more"}
    outcome = run(agent(says(exit=1, output=error)).directory)
    assert outcome.error == error


def test_a_large_configuration_arrives_whole(agent: Callable[..., Agent]) -> None:
    started = agent(says(exit=0, output={}))
    base = len(
        json.dumps({**CONFIG, "cni_agent_run_dir": str(started.directory), "agent_timeout_seconds": 5, "pad": ""})
    )
    assert run(started.directory, config={"pad": "x" * ((1 << 20) - base)}).status == 0
    assert len(started.requests[0]["config"]["pad"]) == (1 << 20) - base


def test_a_large_answer_is_printed_whole(agent: Callable[..., Agent]) -> None:
    output = {"pad": "x" * (4 << 20)}
    assert json.loads(run(agent(says(exit=0, output=output)).directory).stdout) == output


def test_a_stdout_that_cannot_be_written_fails(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [SHIM], stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, env={"CNI_COMMAND": "VERSION"}
        )
    assert done.returncode == 1
    assert b"cannot write to stdout" in done.stderr


def test_version_needs_neither_agent_nor_configuration(tmp_path: Path) -> None:
    for stdin, version in ((b"", "1.1.0"), (b'{"cniVersion": "0.4.0"}', "0.4.0"), (b"nonsense", "1.1.0")):
        outcome = run(tmp_path, stdin, CNI_COMMAND="VERSION", CNI_CONTAINERID="-unset-", CNI_NETNS="-unset-")
        assert outcome.status == 0
        assert json.loads(outcome.stdout) == {
            "cniVersion": version,
            "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        }


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_every_supported_version_is_passed_on(agent: Callable[..., Agent], version: str) -> None:
    started = agent(says(exit=0, output={"cniVersion": version}))
    assert run(started.directory, config={"cniVersion": version}).status == 0
    assert started.requests[0]["config"]["cniVersion"] == version


BAD_STDIN = {
    "empty": (b"", "stdin is empty"),
    "no JSON": (b"hello", "is not JSON: line 1, column"),
    "truncated": (b'{"cniVersion": "1.0.0", "name": ', "is not JSON: line 1"),
    "an array": (b"[1]", "JSON, but not an object"),
    "a number": (b"5", "JSON, but not an object"),
    "null": (b"null", "JSON, but not an object"),
    "truncated on line 3": (b'{\n"a": 1,\n"b"', "line 3, column 3"),
    "something behind": (b"{} {}", "is not JSON"),
    "a byte too long": (b" " * ((1 << 20) - 1) + b"{}", "longer than 1048576 bytes"),
    "endless nesting": (b'{"a":' * 100000, "is not JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "is not JSON"),
}


@pytest.mark.claim("the plugin takes 1 MiB")
@pytest.mark.parametrize("case", BAD_STDIN)
@pytest.mark.parametrize("command", ["ADD", "CHECK"])
def test_bad_stdin_is_a_decoding_error(tmp_path: Path, case: str, command: str) -> None:
    stdin, message = BAD_STDIN[case]
    error = run(tmp_path, stdin, CNI_COMMAND=command).error
    assert error["code"] == 6
    assert message in error["msg"]


BAD_ENVIRONMENT: dict[str, tuple[dict[str, str], list[str]]] = {
    "no command": ({"CNI_COMMAND": "-unset-"}, ["CNI_COMMAND is not set", "ADD, DEL"]),
    "unknown command": ({"CNI_COMMAND": "FROB"}, ['"FROB" is unknown', "ADD, DEL"]),
    "lower case": ({"CNI_COMMAND": "add"}, ['"add" is unknown']),
    "several unset": (
        {"CNI_CONTAINERID": "-unset-", "CNI_NETNS": "", "CNI_IFNAME": "-unset-", "CNI_PATH": "-unset-"},
        ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
    ),
    "container id with a slash": ({"CNI_CONTAINERID": "a/b"}, ['CNI_CONTAINERID "a/b" is invalid']),
    "container id too long": ({"CNI_CONTAINERID": "a" * 129}, ["CNI_CONTAINERID", "at most 128"]),
    "container id from a dot": ({"CNI_CONTAINERID": ".a"}, ['CNI_CONTAINERID ".a" is invalid']),
    "interface too long": ({"CNI_IFNAME": "e" * 16}, ["CNI_IFNAME", "at most 15"]),
    "interface with a slash": ({"CNI_IFNAME": "a/b"}, ['CNI_IFNAME "a/b"']),
    "interface with a space": ({"CNI_IFNAME": "a b"}, ['CNI_IFNAME "a b"']),
    "interface with a colon": ({"CNI_IFNAME": "a:b"}, ['CNI_IFNAME "a:b"']),
    "interface .": ({"CNI_IFNAME": "."}, ['CNI_IFNAME "."']),
    "interface ..": ({"CNI_IFNAME": ".."}, ['CNI_IFNAME ".."']),
}


@pytest.mark.parametrize("case", BAD_ENVIRONMENT)
def test_a_bad_environment_is_named(tmp_path: Path, case: str) -> None:
    variables, messages = BAD_ENVIRONMENT[case]
    error = run(tmp_path, None, None, **variables).error
    assert error["code"] == 4
    for message in messages:
        assert message in error["msg"]


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("ADD", "CNI_CONTAINERID CNI_NETNS CNI_IFNAME CNI_PATH"),
        ("CHECK", "CNI_CONTAINERID CNI_NETNS CNI_IFNAME CNI_PATH"),
        ("DEL", "CNI_CONTAINERID CNI_IFNAME CNI_PATH"),
        ("GC", "CNI_PATH"),
        ("STATUS", "CNI_PATH"),
    ],
)
def test_all_missing_variables_are_named_at_once(tmp_path: Path, command: str, needed: str) -> None:
    unset = dict.fromkeys(["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"], "")
    error = run(tmp_path, None, None, CNI_COMMAND=command, **unset).error
    assert (error["code"], error["cniVersion"]) == (4, "1.1.0")
    assert error["msg"] == f"{command} needs environment variables that are not set: {needed}"


def test_the_longest_names_allowed_are_taken(agent: Callable[..., Agent]) -> None:
    started = agent(says(exit=0, output=None))
    names = {"CNI_CONTAINERID": "0" + "_.-Z" * 31 + "abc", "CNI_IFNAME": "e" * 15}
    assert run(started.directory, None, None, **names).status == 0
    assert started.requests[0]["container_id"] == names["CNI_CONTAINERID"]


@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_del_and_gc_still_refuse_a_configuration_they_cannot_read(tmp_path: Path, command: str) -> None:
    assert run(tmp_path, b"{", CNI_COMMAND=command).error["code"] == 6
    assert run(tmp_path, b"{}", CNI_COMMAND=command).error["code"] == 7


def test_a_value_with_line_breaks_stays_one_line_on_stderr(tmp_path: Path) -> None:
    outcome = run(tmp_path, CNI_CONTAINERID="a\nb")
    assert '"a\nb"' in json.loads(outcome.stdout)["msg"]
    assert outcome.stderr.count("\n") == 1


BAD_CONFIG: dict[str, tuple[dict[str, Any], int, str]] = {
    "no cniVersion": ({"cniVersion": None}, 7, '"cniVersion"'),
    "old cniVersion": ({"cniVersion": "0.2.0"}, 1, 'cniVersion "0.2.0" is not supported; give 0.3.1'),
    "new cniVersion": ({"cniVersion": "2.0.0"}, 1, 'cniVersion "2.0.0" is not supported'),
    "cut cniVersion": ({"cniVersion": "1.0.0\0"}, 7, '"cniVersion" is "1.0.0\\u0000"'),
    "name no string": ({"name": 7}, 7, '"name" is 7 in the configuration; give a non-empty string'),
    "name very long": ({"name": ["é" * 100]}, 7, "... in the configuration"),
    "empty type": ({"type": ""}, 7, '"type" is "" in the configuration'),
    "relative run dir": ({"cni_agent_run_dir": "run"}, 7, 'cni_agent_run_dir is "run"; give an absolute path'),
    "run dir no string": ({"cni_agent_run_dir": 1}, 7, "cni_agent_run_dir is 1; give an absolute path"),
    "run dir too long": ({"cni_agent_run_dir": "/" + "x" * 120}, 7, "too long for a socket path"),
    "timeout zero": ({"agent_timeout_seconds": 0}, 7, "agent_timeout_seconds is 0; give a number above 0"),
    "timeout below zero": ({"agent_timeout_seconds": -1.5}, 7, "agent_timeout_seconds is -1.5; give"),
    "timeout text": ({"agent_timeout_seconds": "5"}, 7, 'agent_timeout_seconds is "5"; give a number'),
    "timeout bool": ({"agent_timeout_seconds": True}, 7, "agent_timeout_seconds is true; give a number"),
    "timeout too long": ({"agent_timeout_seconds": 601}, 7, "at most 600"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_a_bad_configuration_is_named(tmp_path: Path, case: str) -> None:
    config, code, message = BAD_CONFIG[case]
    error = run(tmp_path, config=config).error
    assert error["code"] == code
    assert message in error["msg"]


@pytest.mark.parametrize(("key", "version"), [("cniVersion", "1.1.0"), ("name", "1.0.0"), ("type", "1.0.0")])
def test_a_key_that_is_not_there_is_called_missing(tmp_path: Path, key: str, version: str) -> None:
    stdin = json.dumps({name: value for name, value in CONFIG.items() if name != key}).encode()
    error = run(tmp_path, stdin).error
    assert (error["code"], error["cniVersion"]) == (7, version)
    assert f'"{key}" is missing' in error["msg"]


@pytest.mark.parametrize(("command", "version"), [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "0.4.0")])
def test_a_command_newer_than_the_configuration_is_refused(tmp_path: Path, command: str, version: str) -> None:
    error = run(tmp_path, config={"cniVersion": version}, CNI_COMMAND=command).error
    assert (error["code"], error["cniVersion"]) == (1, version)
    assert f"{command} needs cniVersion" in error["msg"]


@pytest.mark.parametrize("netns", ["/run/netns/never-was", "/proc/self/ns/uts", "/etc/hostname", "/"])
def test_a_path_that_is_no_namespace_is_named(agent: Callable[..., Agent], netns: str) -> None:
    started = agent(says(exit=0, output={}))
    error = run(started.directory, CNI_NETNS=netns).error
    assert error["code"] == 101
    assert f'CNI_NETNS "{netns}"' in error["msg"]
    assert started.requests == []


@pytest.mark.parametrize("netns", ["", "-unset-", "/run/netns/never-was", "/proc/self/ns/uts"])
def test_del_goes_on_without_the_namespace(agent: Callable[..., Agent], netns: str) -> None:
    started = agent(says(exit=0, output=None))
    assert run(started.directory, CNI_COMMAND="DEL", CNI_NETNS=netns).status == 0
    assert started.inodes == [[]]


@pytest.mark.claim("then the pod is not created, and kubelet tries again")
def test_an_agent_that_is_down_is_named_and_may_be_tried_again(tmp_path: Path) -> None:
    error = run(tmp_path, config={"agent_timeout_seconds": 0.2}).error
    assert error["code"] == 11
    assert f"cannot reach {tmp_path}/cni.sock within 0.2 s: No such file" in error["msg"]
    assert "is the sidestep agent running on this node?" in error["msg"]
    (tmp_path / "cni.sock").touch()
    assert run(tmp_path, config={"agent_timeout_seconds": 0.2}).error["code"] == 11
    status = run(tmp_path, config={"cniVersion": "1.1.0"}, CNI_COMMAND="STATUS").error
    assert (status["code"], status["cniVersion"]) == (50, "1.1.0")


@pytest.mark.claim("the plugin waits 10 s for it")
def test_add_waits_for_an_agent_that_comes_within_its_time(agent: Callable[..., Agent], tmp_path: Path) -> None:
    """As while the agent is being replaced: once a sandbox has failed, kubelet waits longer than that takes."""
    socket.socket(socket.AF_UNIX).bind(str(tmp_path / "cni.sock"))  # of an agent that was killed
    began = time.monotonic()

    def arrive() -> None:
        (tmp_path / "cni.sock").unlink()
        agent(says(exit=0, output={"cniVersion": "1.0.0"}))

    threading.Timer(0.5, arrive).start()
    assert run(tmp_path).status == 0
    assert 0.4 < time.monotonic() - began < 2


@pytest.mark.parametrize("command", ["CHECK", "STATUS", "DEL", "GC"])
def test_other_commands_do_not_wait_for_an_agent_that_is_away(tmp_path: Path, command: str) -> None:
    began = time.monotonic()
    run(tmp_path, config={"cniVersion": "1.1.0", "agent_timeout_seconds": 60}, CNI_COMMAND=command)
    assert time.monotonic() - began < 2


def test_add_asks_the_next_agent_if_one_ends_without_an_answer(agent: Callable[..., Agent]) -> None:
    def answer(connection: socket.socket) -> None:
        if len(started.requests) > 2:
            says(exit=0, output={"cniVersion": "1.0.0"})(connection)

    started = agent(answer)
    assert run(started.directory).status == 0
    assert len(started.requests) == 3
    assert started.inodes == [[Path(NETNS).stat().st_ino]] * 3


@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_del_and_gc_succeed_whatever_the_agent_does(tmp_path: Path, command: str) -> None:
    version: dict[str, Any] = {"cniVersion": "1.1.0", "agent_timeout_seconds": 0.2}
    outcome = run(tmp_path, config=version, CNI_COMMAND=command)
    assert (outcome.status, outcome.stdout) == (0, "")
    assert "warning" in outcome.stderr
    for answer in (lambda _: time.sleep(1), sends(b"junk"), says(exit=1, output={"code": 5, "msg": "no"})):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "cni.sock"))
        listener.listen()
        threading.Thread(target=Agent(tmp_path, answer).serve, args=(listener,), daemon=True).start()
        outcome = run(tmp_path, config=version, CNI_COMMAND=command)
        listener.close()
        (tmp_path / "cni.sock").unlink()
        assert (outcome.status, outcome.stdout) == (0, "")
        assert "warning" in outcome.stderr


@pytest.mark.parametrize("way", ["silent", "dripping", "full backlog"])
@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("STATUS", 50)])
def test_a_hung_agent_is_given_up_on(
    agent: Callable[..., Agent], tmp_path: Path, way: str, command: str, code: int
) -> None:
    def drip(connection: socket.socket) -> None:
        for byte in framed(b" " * 100):
            connection.send(bytes([byte]))
            time.sleep(0.05)

    waiting = []
    if way == "full backlog":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "cni.sock"))
        listener.listen(0)
        waiting = [listener]
        for _ in range(2):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            client.connect_ex(str(tmp_path / "cni.sock"))
            waiting.append(client)
    else:
        agent(drip if way == "dripping" else lambda _: time.sleep(2))
    began = time.monotonic()
    error = run(tmp_path, config={"cniVersion": "1.1.0", "agent_timeout_seconds": 0.3}, CNI_COMMAND=command).error
    assert time.monotonic() - began > 0.25
    assert error["code"] == code
    assert "did not answer within 0.3 s" in error["msg"]
    for each in waiting:
        each.close()


GARBAGE = {
    "not JSON": framed(b"<html>"),
    "not an object": framed(b"[]"),
    "no exit": framed(b'{"output": {}}'),
    "empty body": framed(b""),
    "a scalar": framed(b"7"),
    "cut short inside": framed(b'{"exit": 0, "output": {'),
    "failure with a text": framed(b'{"exit": 1, "output": "no"}'),
    "exit a fraction": framed(b'{"exit": 0.5, "output": {}}'),
    "exit no number": framed(b'{"exit": "0", "output": {}}'),
    "output no object": framed(b'{"exit": 0, "output": 7}'),
    "no output": framed(b'{"exit": 0}'),
    "failure without an object": framed(b'{"exit": 1, "output": null}'),
    "length zero": struct.pack("!I", 0),
    "length too large": struct.pack("!I", 9 << 20),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_called_that(agent: Callable[..., Agent], case: str) -> None:
    error = run(agent(sends(GARBAGE[case])).directory).error
    assert error["code"] == 5
    assert "answered garbage" in error["msg"]


@pytest.mark.parametrize(
    "said", [struct.pack("!I", 100) + b"{", b"", b"\0\0"], ids=["a part", "nothing", "half a length"]
)
def test_an_agent_that_ends_meanwhile_may_be_tried_again(agent: Callable[..., Agent], said: bytes) -> None:
    error = run(agent(sends(said)).directory, config={"agent_timeout_seconds": 0.2}).error
    assert error["code"] == 11
    assert "closed the connection without an answer" in error["msg"]


@pytest.mark.parametrize(
    "said", [b"", framed(b"<html>"), framed(b'{"exit": 0}')], ids=["nothing", "no JSON", "no output"]
)
def test_status_calls_whatever_is_no_answer_unavailable(agent: Callable[..., Agent], said: bytes) -> None:
    started = agent(sends(said))
    assert run(started.directory, config={"cniVersion": "1.1.0"}, CNI_COMMAND="STATUS").error["code"] == 50


def test_bytes_that_are_no_utf8_are_refused_without_crashing(tmp_path: Path) -> None:
    environment = {key.encode(): value.encode() for key, value in ENVIRONMENT.items()}
    environment[b"CNI_IFNAME"] = b"\xff/"
    done = subprocess.run([SHIM], input=json.dumps(CONFIG).encode(), env=environment, capture_output=True, timeout=10)
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 4


def test_it_runs_in_an_empty_root(tmp_path: Path) -> None:
    (tmp_path / "shim").write_bytes(SHIM.read_bytes())
    (tmp_path / "shim").chmod(0o755)
    done = subprocess.run(
        ["chroot", tmp_path, "/shim"], env={"PATH": "/usr/sbin:/usr/bin", "CNI_COMMAND": "VERSION"}, capture_output=True
    )
    assert json.loads(done.stdout)["cniVersion"] == "1.1.0"
