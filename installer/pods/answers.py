"""Reads the API server's answers, and keeps only the parts that the agent uses."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog
import urllib3
from pydantic import ValidationError

from cni.policy.pod import PROXY_CONTAINER, Pod
from installer.pods.api_errors import ApiFailed, Expired

log = structlog.get_logger("api")

Json = dict[str, Any]
T = TypeVar("T")

_PART = 1 << 16  # bytes read at once
# bytes of an answer, and of one object in a watch: etcd takes objects of 1.5 MiB
_LONGEST_BODY, _LONGEST_LINE = 256 << 20, 16 << 20
_LONGEST_STATUS = 4096  # bytes read of the body of an error
# the reason in an error of OpenSSL, without the place in its source
_TLS = re.compile(r"\[SSL(?:: \w+)?\] (.+?)(?: \(_ssl\.c:\d+\))?\W*$")
# the largest parts of a Pod; the agent uses none of them but the proxy's env
_BULK = ("managedFields", "volumes", "volumeMounts", "env")


@dataclass(frozen=True)
class Change(Generic[T]):
    """One event of a watch. `thing` is None for a bookmark; `version` is the resourceVersion for the next watch."""

    kind: str
    thing: T | None
    version: str


class Watching(Generic[T]):
    """A running watch."""

    def __init__(self, response: urllib3.HTTPResponse, read: Callable[[Json], T | None], silence: float) -> None:
        """`silence` is how many seconds may pass between two changes or bookmarks."""
        self._response, self._read = response, read
        self._silence = silence

    def changes(self) -> Iterator[Change[T]]:
        """Yield each change when it arrives. Raises Expired, and ApiFailed if the connection breaks."""
        try:
            for line in self._lines():
                if line.strip():
                    yield self._change(parse_json(line))
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            # AttributeError: urllib3 raises it if another thread has closed the connection
            raise ApiFailed(f"the watch broke off: {reason_of(error)}") from error

    def _lines(self) -> Iterator[bytes]:
        """The lines of the answer. Raises ValueError if one does not end."""
        rest = b""
        until = time.monotonic() + self._silence
        while part := self._response.read1(_PART):
            *lines, rest = (rest + part).split(b"\n")
            yield from lines
            if len(rest) > _LONGEST_LINE:
                raise ValueError(f"a line has more than {_LONGEST_LINE >> 20} MiB")
            if lines:
                until = time.monotonic() + self._silence
            elif time.monotonic() > until:
                raise ValueError("a line takes too long")
        yield rest

    def _change(self, event: Json) -> Change[T]:
        kind, thing = event["type"], event["object"]
        if kind == "ERROR":
            status = int(thing.get("code", 0))
            failure = Expired if status == 410 else ApiFailed
            raise failure(f"the watch ended: {thing.get('message', 'no reason given')}", status)
        version = str(thing["metadata"].get("resourceVersion", ""))
        return Change(kind, None if kind == "BOOKMARK" else self._read(thing), version)

    def close(self) -> None:
        """End the watch. May be called from any thread, even while another thread reads."""
        with suppress(OSError, RuntimeError, ValueError):  # the watch has ended already
            self._response.shutdown()
        with suppress(ValueError):  # the thread that reads is closing it, too
            self._response.close()


def parse_json(text: bytes) -> Any:
    """Parse JSON, dropping the _BULK of Pods. Raises ValueError."""
    try:
        return json.loads(text, object_hook=_without_bulk)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def whole_body(response: urllib3.HTTPResponse, until: float) -> bytes:
    """The body of an answer, which is there by `until` (monotonic clock). Raises ValueError, HTTPError and OSError."""
    found = bytearray()
    while part := response.read1(_PART):
        found += part
        if len(found) > _LONGEST_BODY:
            raise ValueError(f"it has more than {_LONGEST_BODY >> 20} MiB")
        if time.monotonic() > until:
            raise ValueError("it takes too long")
    return bytes(found)


def _without_bulk(thing: Json) -> Json:
    """Drop the large parts of a Pod already while parsing: they are three quarters of the memory for 250 large Pods."""
    for key in _BULK:
        # all of _BULK are lists, but a label of the same name is not; keep the env of the proxy, which is used
        if isinstance(thing.get(key), list) and (key != "env" or thing.get("name") != PROXY_CONTAINER):
            del thing[key]
    return thing


def pod_of(thing: Json) -> Pod | None:
    """The parts of a Pod that the agent uses; None, with a warning in the log, if the Pod is malformed."""
    try:
        return Pod.model_validate(thing)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        metadata = thing.get("metadata") or {}
        log.warning("pod.ignored", pod=f"{metadata.get('namespace')}/{metadata.get('name')}", problem=problem)
        return None


def said_by(response: urllib3.HTTPResponse, until: float) -> str:
    """The message of a Status object; for any other body, its first 200 bytes. "" if it is not there by `until`."""
    text = b""
    try:
        while len(text) < _LONGEST_STATUS and (part := response.read1(_LONGEST_STATUS - len(text))):
            text += part
            if time.monotonic() > until:
                return ""
    except (urllib3.exceptions.HTTPError, OSError):
        return ""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200].decode(errors="replace")


def reason_of(error: Exception) -> str:
    """The innermost reason of an error, without urllib3's description of its connection pool."""
    cause = getattr(error, "reason", None) or error
    text = " ".join(str(cause).split())
    if found := _TLS.search(text):
        return found[1]
    return re.sub(r"^\[Errno \d+\] ", "", text.rpartition(": ")[2]) or type(cause).__name__
