"""The API server, as far as one node needs it: its pods, their events, the agent's own DaemonSet.

The kubernetes client reads the configuration and speaks TLS; its generated models stay out, as they would cost more
memory than all the rest of the agent. Every call has a timeout, and none tries again: that is for the caller to say.
"""

import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import urllib3
from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import RESTClientObject, RESTResponse
from pydantic import ValidationError

from cni.pod import Pod
from installer.pods.access import access_of
from installer.pods.errors import ApiFailed, Expired
from installer.settings import Node

# seconds for a connection, and for an answer to anything but a watch
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
# a list comes in pages of so many pods
_PAGE = 250
# the server ends a watch after so many seconds. It sends a bookmark about every minute, so one that is silent for
# longer than the second figure is dead, whatever the connection looks like
_WATCH_SECONDS = 300
_SILENCE_SECONDS = 90.0

OnRequest = Callable[[str, int], None]
Json = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One event of a watch. `pod` is None for a bookmark; `version` is where a later watch may go on."""

    kind: str
    pod: Pod | None
    version: str


@dataclass(frozen=True)
class _Call:
    """One request; `verb` is what roles call it, `silence` how many seconds the server may say nothing."""

    verb: str
    method: str
    path: str
    query: dict[str, str] | None = None
    body: Json | None = None
    silence: float = _ANSWER_SECONDS

    def __str__(self) -> str:
        return f"{self.verb} {self.path}"


class Api:
    """Calls to the API server; each raises ApiFailed. Safe to use from many threads."""

    def __init__(self, configure: Callable[[], Configuration], on_request: OnRequest) -> None:
        """`configure` reads credentials anew; `on_request` is told verb and HTTP status of each request (0: none)."""
        self._configure = configure
        self._on_request = on_request
        self._client, self._configuration = self._connect()

    @classmethod
    def of(cls, node: Node, on_request: OnRequest) -> "Api":
        """From the settings. Raises ApiFailed when the configuration is unusable."""
        return cls(access_of(node), on_request)

    def list_pods(self, node_name: str) -> tuple[list[Pod], str]:
        """All pods of a node, and the resourceVersion from which to watch."""
        pods: list[Pod] = []
        query = {"fieldSelector": f"spec.nodeName={node_name}", "limit": str(_PAGE)}
        while True:
            page = self._json(_Call("list", "GET", "/api/v1/pods", query))
            pods += filter(None, map(_pod, page.get("items") or ()))
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                return pods, str(metadata.get("resourceVersion", ""))
            query["continue"] = metadata["continue"]

    @contextmanager
    def watch_pods(self, node_name: str, version: str) -> Iterator["Watching"]:
        """Changes of a node's pods since a resourceVersion, until the server ends it. Raises Expired."""
        query = {
            "fieldSelector": f"spec.nodeName={node_name}",
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        answer = self._request(_Call("watch", "GET", "/api/v1/pods", query, silence=_SILENCE_SECONDS))
        watching = Watching(answer.response)
        try:
            yield watching
        finally:
            watching.close()

    def get_pod(self, namespace: str, name: str, seconds: float = _ANSWER_SECONDS) -> Pod | None:
        """One pod; None when there is none of that name."""
        try:
            found = self._json(_Call("get", "GET", _pod_path(namespace, name), silence=seconds))
        except ApiFailed as error:
            if error.status == 404:
                return None
            raise
        return _pod(found)

    def delete_pod(self, pod: Pod) -> bool:
        """Delete this very pod; False when it is gone, or has changed since."""
        preconditions = {"uid": pod.uid, "resourceVersion": pod.metadata.resource_version}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions}
        return self._done(_Call("delete", "DELETE", _pod_path(pod.namespace, pod.name), body=body))

    def label_pod(self, pod: Pod, key: str, value: str) -> bool:
        """Put a label on a pod, as Istio does through its status; False if it has that key, is gone or has changed."""
        if key in pod.labels:
            return False
        metadata = {"resourceVersion": pod.metadata.resource_version, "uid": pod.uid, "labels": {key: value}}
        path = f"{_pod_path(pod.namespace, pod.name)}/status"
        return self._done(_Call("patch", "PATCH", path, body={"metadata": metadata}))

    def create_event(self, namespace: str, event: Json) -> None:
        """A core/v1 Event."""
        self._json(_Call("create", "POST", f"/api/v1/namespaces/{quote(namespace)}/events", body=event))

    def repeat_event(self, namespace: str, name: str, count: int, now: str) -> bool:
        """Count an Event that has happened again; False when it is gone. `now` is RFC 3339."""
        path = f"/api/v1/namespaces/{quote(namespace)}/events/{quote(name)}"
        return self._done(_Call("patch", "PATCH", path, body={"count": count, "lastTimestamp": now}))

    def daemonset_is_gone(self, namespace: str, name: str) -> bool:
        """Whether a DaemonSet does not exist, or is being deleted."""
        path = f"/apis/apps/v1/namespaces/{quote(namespace)}/daemonsets/{quote(name)}"
        try:
            found = self._json(_Call("get", "GET", path))
        except ApiFailed as error:
            if error.status == 404:
                return True
            raise
        return bool((found.get("metadata") or {}).get("deletionTimestamp"))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _done(self, call: _Call) -> bool:
        try:
            self._json(call)
        except ApiFailed as error:
            if error.status in (404, 409):
                return False
            raise
        return True

    def _json(self, call: _Call) -> Json:
        answer = self._request(call)
        try:
            with answer.response as response:
                found = json.loads(response.read())
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise ApiFailed(f"{self._configuration.host}: the answer to {call} is broken: {error}") from error
        if not isinstance(found, dict):
            raise ApiFailed(f"{self._configuration.host}: the answer to {call} is no object")
        return found

    def _request(self, call: _Call) -> RESTResponse:
        answer = self._ask(call)
        if answer.status == 401:  # credentials may have been renewed; what is in use is what was read last
            answer.response.close()
            self._client, self._configuration = self._connect()
            answer = self._ask(call)
        if answer.status < 400:
            return answer
        with answer.response as response:
            said = _message(response)
        kind = Expired if answer.status == 410 else ApiFailed
        raise kind(f"{self._configuration.host}: {call}: {answer.status} {said}", answer.status)

    def _ask(self, call: _Call) -> RESTResponse:
        url = self._configuration.host + call.path + (f"?{urlencode(call.query)}" if call.query else "")
        timeout = (min(_CONNECT_SECONDS, call.silence), call.silence)
        headers = self._headers(call.method)
        status = 0
        try:
            answer: RESTResponse = self._client.request(  # type: ignore[no-untyped-call]
                call.method, url, headers, call.body, _request_timeout=timeout
            )
            status = answer.status
        except (urllib3.exceptions.HTTPError, OSError, ssl.SSLError) as error:
            raise ApiFailed(f"{self._configuration.host} cannot be reached: {_reason(error)}") from error
        finally:
            self._on_request(call.verb, status)
        return answer

    def _headers(self, method: str) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "sidestep"}
        if method in ("POST", "DELETE"):
            headers["Content-Type"] = "application/json"
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        token: Any = self._configuration.auth_settings().get("BearerToken")
        if token:
            headers[token["key"]] = token["value"]
        return headers

    def _connect(self) -> tuple[RESTClientObject, Configuration]:
        configuration = self._configure()
        configuration.retries = False
        return RESTClientObject(configuration), configuration


class Watching:
    """A watch that is under way."""

    def __init__(self, response: urllib3.HTTPResponse) -> None:
        self._response = response

    def changes(self) -> Iterator[Change]:
        """What happens, as it happens. Raises Expired, ApiFailed when the connection breaks."""
        try:
            for line in self._response:
                if line.strip():
                    yield _change(json.loads(line))
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            # AttributeError: urllib3 finds its connection gone when somebody else has closed it
            raise ApiFailed(f"the watch broke off: {_reason(error)}") from error

    def close(self) -> None:
        """End it; callable from any thread, whatever another one is reading."""
        with suppress(OSError, RuntimeError, ValueError):  # it has ended already
            self._response.shutdown()
        self._response.close()


def _change(event: Json) -> Change:
    kind, thing = event["type"], event["object"]
    if kind == "ERROR":
        status = int(thing.get("code", 0))
        failure = Expired if status == 410 else ApiFailed
        raise failure(f"the watch ended: {thing.get('message', 'no reason given')}", status)
    version = str(thing["metadata"].get("resourceVersion", ""))
    return Change(kind, None if kind == "BOOKMARK" else _pod(thing), version)


def _pod(thing: Json) -> Pod | None:
    """The parts of a Pod that count; None for one that no API server would have let in."""
    try:
        return Pod.model_validate(thing)
    except ValidationError:
        return None


def _pod_path(namespace: str, name: str) -> str:
    return f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(name)}"


def _message(response: urllib3.HTTPResponse) -> str:
    """What a Status object says, else the beginning of the text."""
    try:
        text = response.read(4096)
    except (urllib3.exceptions.HTTPError, OSError):
        return ""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200].decode(errors="replace")


def _reason(error: Exception) -> str:
    """The innermost reason, without the pool's description of itself."""
    cause = getattr(error, "reason", None) or error
    return str(cause).rpartition(": ")[2] or type(cause).__name__
