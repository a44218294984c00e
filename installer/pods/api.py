"""The API server, as far as one node needs it: its pods, their events, the agent's own DaemonSet.

The kubernetes client reads the configuration and speaks TLS; its generated models stay out, as they would cost more
memory than all the rest of the agent. Every call has a timeout, and none tries again: that is for the caller to say.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import urllib3
from kubernetes.client.configuration import Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.client.rest import RESTClientObject, RESTResponse

from cni.policy.pod import Pod
from installer.pods.access import access_of
from installer.pods.answers import Json, Watching, parse_json, pod_of, reason_of, said_by
from installer.pods.api_errors import ApiFailed, Conflict, Expired
from installer.pods.resource import DAEMONSET, DaemonSetIdentity, Resource, daemonset_of, pods_of
from installer.settings import Node

# seconds for the connection of a watch, and for the answer to anything else
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
# a list comes in pages of so many pods
_PAGE = 250
# the server ends a watch after so many seconds, each time others, so that not all nodes ask again at once (as
# client-go's reflectors do). It sends a bookmark about every minute, so one that is silent for longer than the last
# figure is dead, whatever the connection looks like
_WATCH_SECONDS = (300, 600)
_SILENCE_SECONDS = 90.0

OnRequest = Callable[[str, int], None]
T = TypeVar("T")

# what is left to a second attempt when the first has used up the time
_SHORTEST_SECONDS = 0.1
_CONTENT_TYPES = {
    "POST": {"Content-Type": "application/json"},
    "DELETE": {"Content-Type": "application/json"},
    "PATCH": {"Content-Type": "application/merge-patch+json"},
}


@dataclass(frozen=True)
class _Call:
    """One request; `verb` is what roles call it, `seconds` how long it may take, a watch how long be silent."""

    verb: str
    method: str
    path: str
    query: dict[str, str] | None = None
    body: Json | None = None
    seconds: float = _ANSWER_SECONDS
    accept: str = "application/json"

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

    def list_all(self, resource: Resource[T], version: str = "") -> tuple[list[T], str]:
        """All there is, and the resourceVersion from which to watch.

        `version` says how old the list may be: not older than that, "0" for what the server has at hand, "" for the
        newest. Only the newest may cost a scan of all the cluster's pods in etcd, and is for when nothing else will do.
        Raises Expired when the server cannot tell what there was at that version.
        """
        things: list[T] = []
        query = {"fieldSelector": resource.selector}
        # a limit sends the server to etcd (apiserver's cacher, which else answers such a list from memory)
        query |= {"resourceVersion": version} if version else {"limit": str(_PAGE)}
        while True:
            page = self._json(_Call("list", "GET", resource.path, query, accept=resource.accept("List")))
            things += [thing for each in page.get("items") or () if (thing := resource.read(each)) is not None]
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                return things, str(metadata.get("resourceVersion", ""))
            query["continue"] = metadata["continue"]

    @contextmanager
    def watch(self, resource: Resource[T], version: str) -> Iterator[Watching[T]]:
        """Changes since a resourceVersion, until the server ends it. Raises Expired."""
        query = {
            "fieldSelector": resource.selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(random.randint(*_WATCH_SECONDS)),
        }
        call = _Call("watch", "GET", resource.path, query, seconds=_SILENCE_SECONDS, accept=resource.accept())
        watching = Watching(self._request(call).response, resource.read)
        try:
            yield watching
        finally:
            watching.close()

    def list_pods(self, node_name: str, version: str = "") -> tuple[list[Pod], str]:
        """All pods of a node, as list_all()."""
        return self.list_all(pods_of(node_name), version)

    def get_pod(self, namespace: str, name: str, seconds: float = _ANSWER_SECONDS) -> Pod | None:
        """One pod; None when there is none of that name."""
        found = self._found(_Call("get", "GET", _pod_path(namespace, name), seconds=seconds))
        if found is None:
            return None
        pod = pod_of(found)
        if pod is None:
            raise ApiFailed(f"{self._configuration.host}: what it has as Pod {namespace}/{name} is none")
        return pod

    def selects_pod(self, pod: Pod, labels: str, fields: str) -> bool:
        """Whether label and field selectors, written as for kubectl, choose this very pod."""
        by_field = ",".join(filter(None, (f"metadata.name={pod.name}", fields)))
        path = f"/api/v1/namespaces/{quote(pod.namespace)}/pods"
        page = self._json(_Call("list", "GET", path, {"fieldSelector": by_field, "labelSelector": labels}))
        return any(each["metadata"].get("uid") == pod.uid for each in page.get("items") or ())

    def delete_pod(self, pod: Pod) -> bool:
        """Delete this very pod; False when it is gone. Raises Conflict when it has changed since."""
        preconditions = {"uid": pod.uid, "resourceVersion": pod.metadata.resource_version}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions}
        return self._found(_Call("delete", "DELETE", _pod_path(pod.namespace, pod.name), body=body)) is not None

    def label_pod(self, pod: Pod, key: str, value: str) -> bool:
        """Put a label on a pod, as Istio does through its status; False when it is gone, or has that key.

        Raises Conflict when it has changed since.
        """
        if key in pod.labels:
            return False
        metadata = {"resourceVersion": pod.metadata.resource_version, "uid": pod.uid, "labels": {key: value}}
        path = f"{_pod_path(pod.namespace, pod.name)}/status"
        return self._found(_Call("patch", "PATCH", path, body={"metadata": metadata})) is not None

    def create_event(self, namespace: str, event: Json) -> bool:
        """A core/v1 Event; False when there is no such namespace any more, or an Event of that name already."""
        call = _Call("create", "POST", f"/api/v1/namespaces/{quote(namespace)}/events", body=event)
        try:
            return self._found(call) is not None
        except Conflict:
            return False

    def repeat_event(self, namespace: str, name: str, count: int, now: str) -> bool:
        """Count an Event that has happened again; False when it is gone. `now` is RFC 3339."""
        path = f"/api/v1/namespaces/{quote(namespace)}/events/{quote(name)}"
        return self._found(_Call("patch", "PATCH", path, body={"count": count, "lastTimestamp": now})) is not None

    def get_daemonset(self, namespace: str, seconds: float = _ANSWER_SECONDS) -> DaemonSetIdentity | None:
        """The agents' DaemonSet; None when there is none."""
        resource = daemonset_of(namespace)
        call = _Call("get", "GET", f"{resource.path}/{DAEMONSET}", seconds=seconds, accept=resource.accept())
        found = self._found(call)
        return None if found is None else resource.read(found)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _found(self, call: _Call) -> Json | None:
        """What it is about; None when that is not there."""
        try:
            return self._json(call)
        except ApiFailed as error:
            if error.status == 404:
                return None
            raise

    def _json(self, call: _Call) -> Json:
        answer = self._request(call)
        try:
            with answer.response as response:
                found = parse_json(response.read())
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise ApiFailed(f"{self._configuration.host}: the answer to {call} is broken: {error}") from error
        if not isinstance(found, dict):
            raise ApiFailed(f"{self._configuration.host}: the answer to {call} is no object")
        return found

    def _request(self, call: _Call) -> RESTResponse:
        until = time.monotonic() + call.seconds
        used = self._authorization()
        answer = self._ask(call, used, call.seconds)
        if answer.status == 401:  # credentials may have been renewed; what is in use is what was read last
            self._client, self._configuration = self._connect()
            fresh = self._authorization()
            if fresh != used or not fresh:  # else the answer would be the same. A certificate is not compared
                answer.response.close()
                answer = self._ask(call, fresh, max(_SHORTEST_SECONDS, until - time.monotonic()))
        if answer.status < 400:
            return answer
        with answer.response as response:
            said = said_by(response)
        # 504 with these words: this server has not come as far as the version that another one gave us
        expired = answer.status == 410 or (answer.status == 504 and said.startswith("Too large resource version"))
        kind = Expired if expired else Conflict if answer.status == 409 else ApiFailed
        raise kind(f"{self._configuration.host}: {call}: {answer.status} {said}", answer.status)

    def _ask(self, call: _Call, authorization: dict[str, str], seconds: float) -> RESTResponse:
        url = self._configuration.host + call.path + (f"?{urlencode(call.query)}" if call.query else "")
        timeout = (_CONNECT_SECONDS, seconds) if call.verb == "watch" else seconds
        headers = {"Accept": call.accept, "User-Agent": "sidestep", **authorization}
        headers |= _CONTENT_TYPES.get(call.method, {})
        status = 0
        try:
            answer: RESTResponse = self._client.request(  # type: ignore[no-untyped-call]
                call.method, url, headers, call.body, _request_timeout=timeout
            )
            status = answer.status
        except (urllib3.exceptions.HTTPError, OSError, ApiException) as error:  # the last for TLS's
            raise ApiFailed(f"{self._configuration.host} cannot be reached: {reason_of(error)}") from error
        finally:
            self._on_request(call.verb, status)
        return answer

    def _authorization(self) -> dict[str, str]:
        """The header that says who we are; none with a client certificate. A service account's token is read anew."""
        token: Any = self._configuration.auth_settings().get("BearerToken")
        return {token["key"]: token["value"]} if token else {}

    def _connect(self) -> tuple[RESTClientObject, Configuration]:
        configuration = self._configure()
        configuration.retries = False
        configuration.keep_alive = True  # a peer that has gone without a word is found out before it is needed
        return RESTClientObject(configuration), configuration


def _pod_path(namespace: str, name: str) -> str:
    return f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(name)}"
