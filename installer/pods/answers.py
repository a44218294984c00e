"""What the API server answers, and how much of it is kept."""

import json
import re
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

# OpenSSL's words for what it does not like, without where in its source it says so
_TLS = re.compile(r"\[SSL(?:: \w+)?\] (.+?)(?: \(_ssl\.c:\d+\))?\W*$")
# parts of a Pod that take the most room
_BULK = ("managedFields", "volumes", "volumeMounts", "env")


@dataclass(frozen=True)
class Change(Generic[T]):
    """One event of a watch. `thing` is None for a bookmark; `version` is where a later watch may go on."""

    kind: str
    thing: T | None
    version: str


class Watching(Generic[T]):
    """A watch that is under way."""

    def __init__(self, response: urllib3.HTTPResponse, read: Callable[[Json], T | None]) -> None:
        self._response, self._read = response, read

    def changes(self) -> Iterator[Change[T]]:
        """What happens, as it happens. Raises Expired, ApiFailed when the connection breaks."""
        try:
            for line in self._response:
                if line.strip():
                    yield self._change(parse_json(line))
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            # AttributeError: urllib3 finds its connection gone when somebody else has closed it
            raise ApiFailed(f"the watch broke off: {reason_of(error)}") from error

    def _change(self, event: Json) -> Change[T]:
        kind, thing = event["type"], event["object"]
        if kind == "ERROR":
            status = int(thing.get("code", 0))
            failure = Expired if status == 410 else ApiFailed
            raise failure(f"the watch ended: {thing.get('message', 'no reason given')}", status)
        version = str(thing["metadata"].get("resourceVersion", ""))
        return Change(kind, None if kind == "BOOKMARK" else self._read(thing), version)

    def close(self) -> None:
        """End it; callable from any thread, whatever another one is reading."""
        with suppress(OSError, RuntimeError, ValueError):  # it has ended already
            self._response.shutdown()
        self._response.close()


def parse_json(text: bytes) -> Any:
    """JSON without what nobody reads of a Pod. Raises ValueError."""
    return json.loads(text, object_hook=_without_bulk)


def _without_bulk(thing: Json) -> Json:
    """Drop what nobody reads of a Pod while it is parsed: of 250 large ones that is three quarters of the memory."""
    for key in _BULK:
        # lists they are all, unlike a label of the same name; of environments only the proxy's counts
        if isinstance(thing.get(key), list) and (key != "env" or thing.get("name") != PROXY_CONTAINER):
            del thing[key]
    return thing


def pod_of(thing: Json) -> Pod | None:
    """The parts of a Pod that count; None, and a line in the log, for one that no API server should have let in."""
    try:
        return Pod.model_validate(thing)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        metadata = thing.get("metadata") or {}
        log.warning("pod.ignored", pod=f"{metadata.get('namespace')}/{metadata.get('name')}", problem=problem)
        return None


def said_by(response: urllib3.HTTPResponse) -> str:
    """What a Status object says, else the beginning of the text."""
    try:
        text = response.read(4096)
    except (urllib3.exceptions.HTTPError, OSError):
        return ""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200].decode(errors="replace")


def reason_of(error: Exception) -> str:
    """The innermost reason, without the pool's description of itself."""
    cause = getattr(error, "reason", None) or error
    text = " ".join(str(cause).split())
    if found := _TLS.search(text):
        return found[1]
    return re.sub(r"^\[Errno \d+\] ", "", text.rpartition(": ")[2]) or type(cause).__name__
