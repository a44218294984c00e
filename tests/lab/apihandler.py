"""How the API double answers: the part of the protocol that the agent uses."""

import io
import json
import queue
import socket
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from tests.lab.apiserver import ApiServer

Json = dict[str, Any]
PODS, NAMESPACES = "/api/v1/pods", "/api/v1/namespaces"


def handler_of(api: "ApiServer") -> type[BaseHTTPRequestHandler]:
    """What answers the requests to one server."""

    class Handler(_Handler):
        server_state = api

    return Handler


class _Dribbling(io.BufferedIOBase):
    """Writes answers a byte at a time while the server is to."""

    def __init__(self, api: "ApiServer", file: Any) -> None:
        self._api, self._file = api, file

    def writable(self) -> bool:
        return True

    def write(self, text: Any) -> int:
        for number in range(len(text)):
            if not self._api.dribble:
                self._file.write(text[number:])
                break
            self._file.write(text[number : number + 1])
            time.sleep(self._api.dribble)
        return len(text)

    def close(self) -> None:
        super().close()
        self._file.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_state: "ApiServer"

    def setup(self) -> None:
        super().setup()
        api = self.server_state
        self.wfile = _Dribbling(api, self.wfile)
        with api._lock:
            api._connections.add(self.connection)
            if api._server is None:  # taken just before an outage, which does not know of it
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        with self.server_state._lock:
            self.server_state._connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_POST(self) -> None:
        self._serve(self._post)

    def do_PATCH(self) -> None:
        self._serve(self._patch)

    def do_DELETE(self) -> None:
        self._serve(self._delete)

    def _serve(self, work: Any) -> None:
        api = self.server_state
        url = urlsplit(self.path)
        self.collection = url.path
        self.parts = [part for part in url.path.split("/") if part]
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self.body: Json = json.loads(self.rfile.read(length)) if length else {}
        verb = "WATCH" if self.query.get("watch") == "true" else self.command
        api._count(api.requests, f"{verb} {url.path}")
        if api.latency:
            time.sleep(api.latency)
        api.answering.wait()
        if failing := api.failing:  # once: it may end before this has been answered
            api._count(api.refused, failing)
            self._status(failing, "on demand")
        elif self.command in api.forbidden:
            api._count(api.refused, 403)
            self._status(403, f"{self.command} is forbidden")
        elif self.headers.get("Authorization", "").lower() != f"bearer {api.token}":
            api._count(api.refused, 401)
            self._status(401, "Unauthorized")
        else:
            work()

    def _get(self) -> None:
        api = self.server_state
        match self.parts:
            case (
                ["api", "v1", "pods"]
                | ["api", "v1", "namespaces"]
                | ["api", "v1", "namespaces", _, "pods"]
                | ["apis", "apps", "v1", "namespaces", _, "daemonsets"]
            ):
                if self.query.get("watch") == "true":
                    self._watch()
                else:
                    self._list()
            case ["api", "v1", "namespaces", namespace, "pods", name]:
                self._object(api.pods.get((namespace, name)))
            case ["apis", "apps", "v1", "namespaces", namespace, "daemonsets", name]:
                self._object(api.daemonsets.get((namespace, name)))
            case _:
                self._status(404, "no such resource")

    def _post(self) -> None:
        match self.parts:
            case ["api", "v1", "namespaces", namespace, "events"] if self.body["metadata"]["namespace"] == namespace:
                if any(each["metadata"]["name"] == self.body["metadata"]["name"] for each in self.server_state.events):
                    self._status(409, "already exists")
                    return
                self.server_state.events.append(self.body)
                self._answer(201, self.body)
            case _:
                self._status(404, "no such resource")

    def _patch(self) -> None:
        api = self.server_state
        if self.headers["Content-Type"] != "application/merge-patch+json":
            self._status(415, "merge patches only")
            return
        match self.parts:
            case ["api", "v1", "namespaces", _, "events", name]:
                found = next((each for each in api.events if each["metadata"]["name"] == name), None)
                if found:
                    found.update(self.body)
                self._object(found)
            case ["api", "v1", "namespaces", namespace, "pods", name, "status"]:
                with api._lock:
                    pod = self._as_seen(namespace, name, self.body["metadata"])
                    if pod:
                        for kind in ("labels", "annotations"):
                            _merge(pod["metadata"], kind, self.body["metadata"].get(kind) or {})
                        self._object(api.put(pod))
            case _:
                self._status(404, "no such resource")

    def _delete(self) -> None:
        api = self.server_state
        match self.parts:
            case ["api", "v1", "namespaces", namespace, "pods", name]:
                with api._lock:
                    pod = self._as_seen(namespace, name, self.body.get("preconditions") or {})
                    if pod:
                        api.delete(namespace, name)
                        self._object(pod)
            case _:
                self._status(404, "no such resource")

    def _as_seen(self, namespace: str, name: str, given: Json) -> Json | None:
        """The Pod to change, unless it is gone or another than the client means: that is then answered."""
        api = self.server_state
        api.written.append((self.command, self.body))
        pod = api.pods.get((namespace, name))
        if pod is None:
            self._object(None)
            return None
        if api.conflicts:
            api.conflicts -= 1
            pod = api.put(pod)
        if any(pod["metadata"][key] != given[key] for key in ("uid", "resourceVersion") if given.get(key)):
            self._status(409, "the object has been modified")
            return None
        return pod

    def _is_selected(self, thing: Json) -> bool:
        metadata = thing["metadata"]
        fields = {
            "spec.nodeName": thing.get("spec", {}).get("nodeName"),
            "metadata.name": metadata.get("name"),
            "metadata.namespace": metadata.get("namespace"),
        }
        labels = metadata.get("labels") or {}
        return _fits(self.query.get("fieldSelector", ""), fields) and _fits(self.query.get("labelSelector", ""), labels)

    def _as_asked(self, thing: Json) -> Json:
        """All of it, or the metadata alone."""
        if "as=PartialObjectMetadata" not in self.headers.get("Accept", ""):
            self.server_state.sent_in_full += thing.get("kind") in ("DaemonSet", "Namespace")
            return thing
        kind = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
        return {**kind, "metadata": thing.get("metadata") or {}}

    def _all(self) -> list[Json]:
        api = self.server_state
        if self.collection == PODS:
            return list(api.pods.values())
        if self.collection == NAMESPACES:
            return list(api.namespaces.values())
        *_, namespace, kind = self.parts
        every = api.pods if kind == "pods" else api.daemonsets
        return [each for (of, _), each in every.items() if of == namespace]

    def _list(self) -> None:
        """In pages when the newest is asked for; else at once, as out of the server's memory."""
        api = self.server_state
        wanted = self.query.get("resourceVersion", "")
        with api._lock:
            version, things = str(api._version), self._all()
            if wanted not in ("", "0") and int(wanted) > int(version):
                self._status(504, f"Too large resource version: {wanted}, current: {version}")
                return
            if wanted == "0" and api._old and self.collection == PODS:
                version, things = api._old
            things = [self._as_asked(each) for each in things if self._is_selected(each)]
            api.scans += not wanted
            start = int(self.query.get("continue") or 0)
            end = len(things) if wanted else start + min(api.page_limit, int(self.query.get("limit") or 500))
            metadata = {"resourceVersion": version}
            if end < len(things):
                metadata["continue"] = str(end)
            page = {"kind": "List", "metadata": metadata, "items": things[start:end]}
        self._answer(200, page)

    def _watch(self) -> None:
        api = self.server_state
        changes: queue.Queue[Json | None] = queue.Queue()
        with api._lock:
            since = int(self.query["resourceVersion"])
            if since < api.expired_before:
                self._status(410, "too old resource version")
                return
            for path, change in api._history:
                if path == self.collection and int(change["object"]["metadata"]["resourceVersion"]) > since:
                    changes.put(change)
            api._watches[changes] = self.collection
        try:
            self._stream(changes, time.monotonic() + float(self.query["timeoutSeconds"]))
        finally:
            with api._lock:
                api._watches.pop(changes, None)

    def _stream(self, changes: "queue.Queue[Json | None]", deadline: float) -> None:
        api = self.server_state
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while (left := deadline - time.monotonic()) > 0:
            try:
                change = changes.get(timeout=min(left, api.bookmark_seconds))
            except queue.Empty:
                change = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(api._version)}}}
            if change is None:  # broken in the middle of a chunk
                self.wfile.write(b"400\r\n{")
                self.close_connection = True
                return
            if change["type"] in ("BOOKMARK", "ERROR"):
                self._send(change)
            elif self._is_selected(change["object"]):
                self._send({**change, "object": self._as_asked(change["object"])})
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, change: Json) -> None:
        line = json.dumps(change).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def _object(self, found: Json | None) -> None:
        if found is None:
            self._status(404, "not found")
        else:
            self._answer(200, self._as_asked(found))

    def _status(self, code: int, message: str) -> None:
        self._answer(code, {"kind": "Status", "code": code, "message": message})

    def _answer(self, code: int, thing: Json) -> None:
        text = json.dumps(thing).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def _merge(metadata: Json, kind: str, given: Json) -> None:
    """Apply a merge patch (RFC 7386) to the labels or annotations."""
    merged = {**(metadata.get(kind) or {}), **given}
    metadata[kind] = {key: value for key, value in merged.items() if value is not None}


def _fits(selector: str, having: Json) -> bool:
    """As far as KEY=VALUE and commas, which is not all that a real server understands."""
    terms = [term.partition("=") for term in filter(None, selector.split(","))]
    return all(having.get(key) == value for key, _, value in terms)
