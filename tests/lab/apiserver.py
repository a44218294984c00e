"""An API server for one node's agent: pods, events and DaemonSets over real HTTP, with faults on demand.

No registry ships kube-apiserver. This one speaks the part of the protocol that the agent uses: lists in pages, chunked
watches with bookmarks, resourceVersions that expire, preconditions, bearer tokens; with an authority, over TLS.
"""

import json
import queue
import socket
import ssl
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trustme

Json = dict[str, Any]


class ApiServer:
    """Listens at `address` while running(); driven from the same process."""

    def __init__(self, address: str = "127.0.0.1", authority: trustme.CA | None = None) -> None:
        self.address = address
        self.authority = authority
        self.port = 0
        self.pods: dict[tuple[str, str], Json] = {}
        self.events: list[Json] = []
        self.daemonsets: dict[tuple[str, str], Json] = {}
        self.requests: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()
        self.scans = 0  # lists that a real server can only answer by reading all the cluster's pods
        # faults
        self.token = "first"
        self.latency = 0.0
        self.answering = threading.Event()  # while cleared, connections and requests are taken and not answered
        self.answering.set()
        self.failing = 0  # HTTP status of every answer
        self.expired_before = 0  # resourceVersions below are answered 410
        self.page_limit = 100
        self.bookmark_seconds = 60.0
        self._version = 100
        self._lock = threading.RLock()
        self._history: list[Json] = []
        self._old: tuple[str, list[Json]] | None = None
        self._watches: set[queue.Queue[Json | None]] = set()
        self._connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None

    @contextmanager
    def running(self) -> Iterator["ApiServer"]:
        """Serve meanwhile."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def start(self) -> None:
        """Listen, at the port of the last time if there was one."""
        self._server = _Server((self.address, self.port), _handler(self))
        if self.authority:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.authority.issue_cert(self.address).configure_cert(context)
            # the handshake is the handler's, so that one client cannot keep the others waiting
            listening = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
            self._server.socket = listening
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """An outage: no listening socket, every connection broken."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self.answering.set()
        self.drop_watches()
        with self._lock:
            for connection in list(self._connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def put(self, pod: Json) -> Json:
        """Create or replace a Pod; returns it as stored."""
        with self._lock:
            metadata = pod.setdefault("metadata", {})
            metadata.setdefault("namespace", "default")
            metadata.setdefault("uid", str(uuid.uuid4()))
            key = (metadata["namespace"], metadata["name"])
            old = self.pods.get(key)
            if old and old["metadata"]["uid"] != metadata["uid"]:
                self.delete(*key)
                old = None
            stored = json.loads(json.dumps(pod))
            stored["metadata"]["resourceVersion"] = self._next()
            self.pods[key] = stored
            self._publish("MODIFIED" if old else "ADDED", stored)
            return stored  # type: ignore[no-any-return]

    def delete(self, namespace: str, name: str) -> None:
        """Remove a Pod."""
        with self._lock:
            gone = self.pods.pop((namespace, name))
            gone["metadata"]["resourceVersion"] = self._next()
            self._publish("DELETED", gone)

    def drop_watches(self) -> None:
        """End every watch in the middle."""
        with self._lock:
            for each in self._watches:
                each.put(None)

    def bookmark(self) -> None:
        """Send a bookmark on every watch."""
        with self._lock:
            thing = {"kind": "Pod", "metadata": {"resourceVersion": self._next()}}
            for each in self._watches:
                each.put({"type": "BOOKMARK", "object": thing})

    def expire(self) -> None:
        """Forget the past: every resourceVersion handed out so far is too old, on open watches too."""
        with self._lock:
            self.expired_before = int(self._next())
            for each in self._watches:
                each.put({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}})
                each.put(None)

    def lag(self) -> None:
        """Be the one of several servers that has not heard of what comes from now on, for lists of any age."""
        with self._lock:
            self._old = str(self._version), json.loads(json.dumps(list(self.pods.values())))

    @property
    def watchers(self) -> int:
        """How many watches are open."""
        with self._lock:
            return len(self._watches)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self.authority else 'http'}://{self.address}:{self.port}"

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig with the present token; the authority's certificate goes beside it."""
        user = {"name": "u", "user": {"token": self.token}}
        cluster: Json = {"name": "c", "cluster": {"server": self.url}}
        if self.authority:
            ca = path.with_name("ca.crt")
            self.authority.cert_pem.write_to_path(ca)
            cluster["cluster"]["certificate-authority"] = str(ca)
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "x"}
        _replace(path, json.dumps(config | {"clusters": [cluster], "users": [user], "contexts": [context]}))
        return path

    def service_account(self, directory: Path) -> Path:
        """Write what kubelet mounts into a pod, with the present token."""
        assert self.authority, "a service account comes with a CA"
        directory.mkdir(exist_ok=True)
        self.authority.cert_pem.write_to_path(directory / "ca.crt")
        _replace(directory / "token", self.token)
        return directory

    def _count(self, counter: Counter[Any], what: object) -> None:
        with self._lock:
            counter[what] += 1

    def _next(self) -> str:
        self._version += 1
        return str(self._version)

    def _publish(self, kind: str, pod: Json) -> None:
        change = {"type": kind, "object": json.loads(json.dumps(pod))}
        self._history.append(change)
        for each in self._watches:
            each.put(change)


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.rename(path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that break connections are what this is for."""


def _handler(api: ApiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_state = api

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_state: ApiServer

    def setup(self) -> None:
        super().setup()
        api = self.server_state
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
        elif self.headers.get("Authorization", "").lower() != f"bearer {api.token}":
            api._count(api.refused, 401)
            self._status(401, "Unauthorized")
        else:
            work()

    def _get(self) -> None:
        api = self.server_state
        match self.parts:
            case ["api", "v1", "pods"] if self.query.get("watch") == "true":
                self._watch()
            case ["api", "v1", "pods"]:
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
                pod = api.pods.get((namespace, name))
                given = self.body["metadata"]
                if pod and self._matches(pod, given):
                    pod["metadata"].setdefault("labels", {}).update(given["labels"])
                    self._object(api.put(pod))
                elif pod:
                    self._status(409, "the object has been modified")
                else:
                    self._object(None)
            case _:
                self._status(404, "no such resource")

    def _delete(self) -> None:
        api = self.server_state
        match self.parts:
            case ["api", "v1", "namespaces", namespace, "pods", name]:
                pod = api.pods.get((namespace, name))
                if pod and not self._matches(pod, self.body.get("preconditions") or {}):
                    self._status(409, "precondition failed")
                    return
                if pod:
                    api.delete(namespace, name)
                self._object(pod)
            case _:
                self._status(404, "no such resource")

    def _matches(self, pod: Json, given: Json) -> bool:
        return all(pod["metadata"][key] == given[key] for key in ("uid", "resourceVersion") if given.get(key))

    def _selected(self, pods: list[Json]) -> list[Json]:
        field, _, value = self.query.get("fieldSelector", "").partition("=")
        assert field in ("", "spec.nodeName")
        return [pod for pod in pods if not field or pod.get("spec", {}).get("nodeName") == value]

    def _list(self) -> None:
        """In pages when the newest is asked for; else at once, as out of the server's memory."""
        api = self.server_state
        wanted = self.query.get("resourceVersion", "")
        with api._lock:
            version, pods = str(api._version), list(api.pods.values())
            if wanted not in ("", "0") and int(wanted) > int(version):
                self._status(504, f"Too large resource version: {wanted}, current: {version}")
                return
            if wanted == "0" and api._old:
                version, pods = api._old
            pods = self._selected(pods)
            api.scans += not wanted
            start = int(self.query.get("continue") or 0)
            end = len(pods) if wanted else start + min(api.page_limit, int(self.query.get("limit") or 500))
            metadata = {"resourceVersion": version}
            if end < len(pods):
                metadata["continue"] = str(end)
            page = {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": pods[start:end]}
        self._answer(200, page)

    def _watch(self) -> None:
        api = self.server_state
        changes: queue.Queue[Json | None] = queue.Queue()
        with api._lock:
            since = int(self.query["resourceVersion"])
            if since < api.expired_before:
                self._status(410, "too old resource version")
                return
            for change in api._history:
                if int(change["object"]["metadata"]["resourceVersion"]) > since:
                    changes.put(change)
            api._watches.add(changes)
        try:
            self._stream(changes, time.monotonic() + float(self.query["timeoutSeconds"]))
        finally:
            with api._lock:
                api._watches.discard(changes)

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
            if self._is_selected(change):
                line = json.dumps(change).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")

    def _is_selected(self, change: Json) -> bool:
        node = self.query.get("fieldSelector", "").partition("=")[2]
        return change["type"] in ("BOOKMARK", "ERROR") or change["object"].get("spec", {}).get("nodeName") == node

    def _object(self, found: Json | None) -> None:
        if found is None:
            self._status(404, "not found")
        else:
            self._answer(200, found)

    def _status(self, code: int, message: str) -> None:
        self._answer(code, {"kind": "Status", "code": code, "message": message})

    def _answer(self, code: int, thing: Json) -> None:
        text = json.dumps(thing).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
