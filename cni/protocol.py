"""The messages that the agent takes, with the results and errors that the shim prints for the CNI runtime.

Each side sends one message over a unix stream socket: its length as four bytes in network order, then a JSON object.
With its first bytes the shim sends the pod's network namespace as a file descriptor, so the agent needs no host mount
to reach the namespace.
"""

import json
import socket
import struct
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cni.cgroup_path import below_root
from cni.errors import CniError, Code, InvalidRequest

SOCKET_NAME = "cni.sock"
# bytes. The shim reads at most 1 MiB of configuration; escaping it as JSON again can make it six times as long
MAX_MESSAGE = 8 << 20
_PART = 1 << 16  # bytes received at once
_LENGTH = struct.Struct("!I")
NEWEST_VERSION = "1.1.0"


class RuntimeConfig(BaseModel):
    """What the runtime passes for the capabilities in sidestep's entry of the conf list. Other keys are ignored."""

    model_config = ConfigDict(frozen=True)

    annotations: dict[str, str] | None = Field(default=None, alias="io.kubernetes.cri.pod-annotations")
    cgroup_path: str | None = Field(default=None, alias="cgroupPath")

    def cgroup(self) -> Path | None:
        """The cgroup of the pod's containers, as a path below the root. None if the runtime does not say.

        Raises InvalidRequest.
        """
        if not self.cgroup_path:
            return None
        path = below_root(self.cgroup_path)
        if path is None:
            raise InvalidRequest(
                f'runtimeConfig.cgroupPath: "{self.cgroup_path}" is no cgroup; give a path, NAME.slice or '
                "SLICE:PREFIX:NAME"
            )
        return path


class NetworkConfig(BaseModel):
    """The plugin's object of the conf list, as the runtime writes it to the plugin's stdin."""

    model_config = ConfigDict(extra="allow", frozen=True)

    cni_version: str = Field(alias="cniVersion")
    name: str
    type: str
    prev_result: dict[str, Any] | None = Field(default=None, alias="prevResult")
    # Istio's own keys: the namespace of the agent's DaemonSet, and the namespaces where nothing is captured
    pod_namespace: str = ""
    exclude_namespaces: tuple[str, ...] = ()
    runtime_config: RuntimeConfig = Field(default=RuntimeConfig(), alias="runtimeConfig")
    valid_attachments: list[dict[str, str]] | None = Field(default=None, alias="cni.dev/valid-attachments")


class Request(BaseModel):
    """One CNI invocation as the shim passes it on."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1]
    command: Literal["ADD", "DEL", "CHECK", "STATUS", "GC"]
    container_id: str
    ifname: str
    netns: str
    args: str
    config: NetworkConfig

    @property
    def result(self) -> dict[str, Any]:
        """The result of a chained plugin that adds nothing: the previous result, unchanged."""
        return self.config.prev_result or {"cniVersion": self.config.cni_version}


class Passed(BaseModel):
    """The plugin let a pod pass at ADD without asking, and says so. It waits for no answer, and gets none."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1]
    command: Literal["PASSED"]
    # limits of what the agent remembers; the names' are Kubernetes' (a DNS subdomain), the id's is the plugin's
    container_id: str = Field(max_length=128)
    namespace: str = Field(max_length=253)
    name: str = Field(max_length=253)
    uid: str = Field(max_length=128)
    reason: str = Field(max_length=1024)


Asked = Literal[
    "WHO_PASSED", "WHO_WAS_REFUSED", "WHO_WAS_TAKEN_OVER", "WHO_IS_AMBIENT", "WHAT_FAILED", "WHAT_WAS_LOGGED"
]
# question → the one key of the answer's output, which has a list
ANSWERS: dict[Asked, str] = {
    "WHO_PASSED": "passed",
    "WHO_WAS_REFUSED": "refused",
    "WHO_WAS_TAKEN_OVER": "taken_over",
    "WHO_IS_AMBIENT": "ambient",
    "WHAT_FAILED": "failed",
    "WHAT_WAS_LOGGED": "lines",
}


class Question(BaseModel):
    """A command asks the agent for what only it knows; ANSWERS has the answer's key.

    WHO_PASSED: pods that were let pass, {"pod": …, "reason": …}. WHO_WAS_REFUSED: pods, Refusal.document().
    WHO_WAS_TAKEN_OVER: names of pods that were taken over from Istio's rules.
    WHO_IS_AMBIENT: one document of the node's ambient mode, Ambient.document() in cni/verbs.py; none if it is off.
    WHAT_FAILED: connections that were refused or denied, Failure.document(). WHAT_WAS_LOGGED: the last log lines.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    command: Asked


class Order(BaseModel):
    """A command wants a running pod exchanged (cni/enrolment/exchange.py). The answer's key "done" says what was done.

    TAKE_OVER: from Istio's rules to sidestep. GIVE_BACK: from sidestep to the rules that it had before.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    command: Literal["TAKE_OVER", "GIVE_BACK"]
    namespace: str = Field(max_length=253)
    name: str = Field(max_length=253)


Message = Request | Passed | Question | Order
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="command")])


class PodArgs(BaseModel):
    """The Kubernetes part of CNI_ARGS. The fields are empty if the sandbox is not a Kubernetes pod."""

    model_config = ConfigDict(frozen=True)

    namespace: str = ""
    name: str = ""
    uid: str = ""


def pod_args(text: str) -> PodArgs:
    """Parse CNI_ARGS ("K8S_POD_NAME=a;K8S_POD_NAMESPACE=b;…", any order). Raises InvalidRequest."""
    known = {"K8S_POD_NAME", "K8S_POD_NAMESPACE", "K8S_POD_UID", "K8S_POD_INFRA_CONTAINER_ID"}
    pairs: dict[str, str] = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidRequest(f'CNI_ARGS: "{pair}" is not KEY=VALUE', code=Code.INVALID_ENVIRONMENT)
        pairs[key] = value
    unknown = sorted(set(pairs) - known - {"IgnoreUnknown"})
    if unknown and pairs.get("IgnoreUnknown", "").lower() not in ("1", "true", "t"):
        raise InvalidRequest(
            f"CNI_ARGS: unknown keys {', '.join(unknown)}; give IgnoreUnknown=1 to allow them",
            code=Code.INVALID_ENVIRONMENT,
        )
    return PodArgs(
        namespace=pairs.get("K8S_POD_NAMESPACE", ""),
        name=pairs.get("K8S_POD_NAME", ""),
        uid=pairs.get("K8S_POD_UID", ""),
    )


def receive_message(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one message: its JSON, and the file descriptors that came with it (at most one). The caller closes them.

    The connection's timeout is for the whole message. Raises InvalidRequest if the message is empty, cut short or
    longer than MAX_MESSAGE, and TimeoutError if it is not there in time.
    """
    seconds = connection.gettimeout()
    until = None if seconds is None else time.monotonic() + seconds
    head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    try:
        head += _received(connection, _LENGTH.size - len(head), until)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
        if not 0 < length <= MAX_MESSAGE:
            raise InvalidRequest(f"the message has {length} bytes; send 1 to {MAX_MESSAGE}")
        body = _received(connection, length, until)
        connection.settimeout(seconds)
        if len(body) < length:
            raise InvalidRequest(f"the message ended after {len(body)} of {length} bytes; send all of them")
        return body, descriptors
    except BaseException:
        for descriptor in descriptors:
            socket.close(descriptor)
        raise


def _received(connection: socket.socket, size: int, until: float | None) -> bytes:
    """So many bytes, or fewer if the other end sends no more. Raises TimeoutError."""
    found = bytearray()
    while len(found) < size:
        if until is not None:
            connection.settimeout(max(0.001, until - time.monotonic()))
        part = connection.recv(min(size - len(found), _PART))
        if not part:
            break
        found += part
    return bytes(found)


def decode(message: bytes) -> Message:
    """Parse a message. Raises InvalidRequest that names the first wrong field."""
    try:
        return _MESSAGE.validate_json(message)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "message"  # the first part is the command
        raise InvalidRequest(f"{where}: {first['msg']}", code=Code.DECODE_FAILURE) from error


def encode(answer: dict[str, Any]) -> bytes:
    """An answer as bytes for the socket: its length in network order, then its JSON."""
    body = json.dumps(answer, ensure_ascii=False).encode()
    return _LENGTH.pack(len(body)) + body


def success(output: dict[str, Any] | None) -> dict[str, Any]:
    """The answer that makes the shim print `output` (nothing for None) and exit 0."""
    return {"exit": 0, "output": output}


def failure(error: CniError, cni_version: str = NEWEST_VERSION) -> dict[str, Any]:
    """The answer that makes the shim print a CNI error object and exit 1."""
    output: dict[str, Any] = {"cniVersion": cni_version, "code": int(error.code), "msg": str(error)}
    if error.details:
        output["details"] = error.details
    return {"exit": 1, "output": output}
