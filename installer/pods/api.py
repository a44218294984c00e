"""Calls to the API server that one node needs: its pods, their events, the agent's own DaemonSet.

The kubernetes client reads the configuration and speaks TLS. Its generated models are not used: they would take more
memory than the rest of the agent. Every call has a timeout. No call retries, except with renewed credentials: that is
left to the caller.
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
from installer.pods.answers import Json, Watching, parse_json, pod_of, reason_of, said_by, whole_body
from installer.pods.api_errors import ApiFailed, Conflict, Expired
from installer.pods.deadlines import give_deadlines
from installer.pods.resource import DaemonSetIdentity, Resource, daemonset_of, image_in, pods_of
from installer.settings import Node

# seconds to connect a watch, and to answer any other request
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
# pods in a page of a list
_PAGE = 250
# the server ends a watch after a random time between these seconds, so that the nodes do not all ask again at once
# (client-go's reflectors do the same). It sends a bookmark about every minute, so a watch that is silent for
# _SILENCE_SECONDS is dead, even if its connection looks alive
_WATCH_SECONDS = (300, 600)
_SILENCE_SECONDS = 90.0

OnRequest = Callable[[str, int], None]
T = TypeVar("T")

# least seconds for a second attempt, if the first has used up the time
_SHORTEST_SECONDS = 0.1
_CONTENT_TYPES = {
    "POST": {"Content-Type": "application/json"},
    "DELETE": {"Content-Type": "application/json"},
    "PATCH": {"Content-Type": "application/merge-patch+json"},
}


@dataclass(frozen=True)
class _Call:
    """One request. `verb` is the action's name in roles. `seconds` is the time for all of the answer.

    Of a watch, it is the time for the headers and for each change.
    """

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
        """Set up a client. Raises ApiFailed if the configuration is unusable.

        `configure` reads the credentials anew. `on_request` gets verb and HTTP status (0: no answer) of each request.
        """
        self._configure = configure
        self._on_request = on_request
        self._client, self._configuration = self._connect()

    @classmethod
    def of(cls, node: Node, on_request: OnRequest) -> "Api":
        """A client from the settings. Raises ApiFailed if the configuration is unusable."""
        return cls(access_of(node), on_request)

    def list_all(self, resource: Resource[T], version: str = "") -> tuple[list[T], str]:
        """List a resource; returns the things and the resourceVersion from which to watch.

        `version` says how old the list may be: not older than that resourceVersion, "0" for what the server has in
        memory, "" for the newest. Only the newest may cost a scan of all the cluster's pods in etcd, so ask for it only
        if nothing else will do. Raises Expired if the server can't serve the version.
        """
        things: list[T] = []
        query = {"fieldSelector": resource.selector} if resource.selector else {}
        # a limit makes the server read from etcd; without a limit its cacher answers from memory
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
        """Watch changes since a resourceVersion, until the server ends the watch. Raises Expired."""
        query = {
            **({"fieldSelector": resource.selector} if resource.selector else {}),
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(random.randint(*_WATCH_SECONDS)),
        }
        call = _Call("watch", "GET", resource.path, query, seconds=_SILENCE_SECONDS, accept=resource.accept())
        watching = Watching(self._request(call).response, resource.read, call.seconds)
        try:
            yield watching
        finally:
            watching.close()

    def list_pods(self, node_name: str, version: str = "") -> tuple[list[Pod], str]:
        """List the pods of a node; `version` and the result are those of list_all()."""
        return self.list_all(pods_of(node_name), version)

    def get_pod(self, namespace: str, name: str, seconds: float = _ANSWER_SECONDS) -> Pod | None:
        """One pod; None if there is none of that name. `seconds` is the timeout."""
        found = self._found(_Call("get", "GET", _pod_path(namespace, name), seconds=seconds))
        if found is None:
            return None
        pod = pod_of(found)
        if pod is None:
            raise ApiFailed(f"{self._configuration.host}: Pod {namespace}/{name} is malformed; the log says where")
        return pod

    def selects_pod(self, pod: Pod, labels: str, fields: str) -> bool:
        """Whether label and field selectors, in kubectl's notation, choose this pod."""
        by_field = ",".join(filter(None, (f"metadata.name={pod.name}", fields)))
        path = f"/api/v1/namespaces/{quote(pod.namespace)}/pods"
        page = self._json(_Call("list", "GET", path, {"fieldSelector": by_field, "labelSelector": labels}))
        return any(each["metadata"].get("uid") == pod.uid for each in page.get("items") or ())

    def delete_pod(self, pod: Pod) -> bool:
        """Delete this pod; False if it is gone. Raises Conflict if it has changed since it was read."""
        preconditions = {"uid": pod.uid, "resourceVersion": pod.metadata.resource_version}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions}
        return self._found(_Call("delete", "DELETE", _pod_path(pod.namespace, pod.name), body=body)) is not None

    def label_pod(self, pod: Pod, key: str, value: str) -> bool:
        """Put a label on a pod; False if the pod is gone, or has a label of that key.

        Like Istio, this patches the subresource status. Raises Conflict if the pod has changed since it was read.
        """
        if key in pod.labels:
            return False
        metadata = {"resourceVersion": pod.metadata.resource_version, "uid": pod.uid, "labels": {key: value}}
        path = f"{_pod_path(pod.namespace, pod.name)}/status"
        return self._found(_Call("patch", "PATCH", path, body={"metadata": metadata})) is not None

    def annotate_pod(self, pod: Pod, key: str, value: str | None, seconds: float = _ANSWER_SECONDS) -> bool:
        """Give a pod an annotation, or take it away (None); False if the pod is gone. `seconds` is the timeout.

        Like Istio, this patches the subresource status. Raises Conflict if a newer pod has the same name.
        """
        path = f"{_pod_path(pod.namespace, pod.name)}/status"
        body = {"metadata": {"uid": pod.uid, "annotations": {key: value}}}
        return self._found(_Call("patch", "PATCH", path, body=body, seconds=seconds)) is not None

    def create_event(self, namespace: str, event: Json) -> bool:
        """Create a core/v1 Event; False if the namespace is gone, or an Event of that name exists."""
        call = _Call("create", "POST", f"/api/v1/namespaces/{quote(namespace)}/events", body=event)
        try:
            return self._found(call) is not None
        except Conflict:
            return False

    def repeat_event(self, namespace: str, name: str, count: int, now: str) -> bool:
        """Set count and last time (`now`, RFC 3339) of an Event that happened again; False if the Event is gone."""
        path = f"/api/v1/namespaces/{quote(namespace)}/events/{quote(name)}"
        return self._found(_Call("patch", "PATCH", path, body={"count": count, "lastTimestamp": now})) is not None

    def get_daemonset(self, namespace: str, name: str, seconds: float = _ANSWER_SECONDS) -> DaemonSetIdentity | None:
        """A DaemonSet, with its image; None if there is none. `seconds` is the timeout."""
        resource = daemonset_of(namespace, name)
        found = self._found(_Call("get", "GET", f"{resource.path}/{quote(name)}", seconds=seconds))
        return None if found is None else resource.read(found)

    def get_agents_image(self, namespace: str, pod: str, seconds: float = _ANSWER_SECONDS) -> str:
        """The image of the agent's container in one of its pods; "" if there is none. `seconds` is the timeout."""
        found = self._found(_Call("get", "GET", _pod_path(namespace, pod), seconds=seconds))
        return image_in((found or {}).get("spec") or {})

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _found(self, call: _Call) -> Json | None:
        """The answer of a call; None if its object does not exist (404)."""
        try:
            return self._json(call)
        except ApiFailed as error:
            if error.status == 404:
                return None
            raise

    def _json(self, call: _Call) -> Json:
        until = time.monotonic() + call.seconds
        answer = self._request(call)
        try:
            with answer.response as response:
                found = parse_json(whole_body(response, until))
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise ApiFailed(f"{self._configuration.host}: the answer to {call} is broken: {error}") from error
        if not isinstance(found, dict):
            raise ApiFailed(f"{self._configuration.host}: the answer to {call} is not a JSON object")
        return found

    def _request(self, call: _Call) -> RESTResponse:
        until = time.monotonic() + call.seconds
        used = self._authorization()
        answer = self._ask(call, used, call.seconds)
        if answer.status == 401:  # credentials may have been renewed since they were read
            self._client, self._configuration = self._connect()
            fresh = self._authorization()
            if fresh != used or not fresh:  # same token, same answer; certificates are not compared
                answer.response.close()
                answer = self._ask(call, fresh, max(_SHORTEST_SECONDS, until - time.monotonic()))
        if answer.status < 400:
            return answer
        with answer.response as response:
            said = said_by(response, until)
        # 504 with these words: another API server gave us the version, and this server has not reached it yet
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
        except (urllib3.exceptions.HTTPError, OSError, ApiException) as error:  # ApiException: TLS
            raise ApiFailed(f"{self._configuration.host} cannot be reached: {reason_of(error)}") from error
        finally:
            self._on_request(call.verb, status)
        return answer

    def _authorization(self) -> dict[str, str]:
        """The header with our token, empty with a client certificate. Reads a service account's token anew."""
        token: Any = self._configuration.auth_settings().get("BearerToken")
        return {token["key"]: token["value"]} if token else {}

    def _connect(self) -> tuple[RESTClientObject, Configuration]:
        configuration = self._configure()
        configuration.retries = False
        configuration.keep_alive = True  # TCP keep-alive notices a vanished peer early
        client = RESTClientObject(configuration)
        give_deadlines(client.pool_manager)
        return client, configuration


def _pod_path(namespace: str, name: str) -> str:
    return f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(name)}"
