"""An API server for one node's agent: pods, namespaces, events and DaemonSets over real HTTP, with faults on demand.

No registry ships kube-apiserver. This one speaks the part of the protocol that the agent uses: lists in pages, chunked
watches with bookmarks, resourceVersions that expire, preconditions, bearer tokens; with an authority, over TLS.
"""

import json
import queue
import socket
import ssl
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme

from tests.lab.apihandler import NAMESPACES, PODS, handler_of

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
        self.namespaces: dict[str, Json] = {}
        self.requests: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()
        self.written: list[tuple[str, Json]] = []  # what Pods were deleted and patched with, refused ones too
        self.sent_in_full = 0  # DaemonSets and namespaces of which more than the metadata was asked for
        self.scans = 0  # lists that a real server can only answer by reading all the cluster's pods
        # faults
        self.token = "first"
        self.latency = 0.0
        self.dribble = 0.0  # seconds between two bytes of each answer
        self.answering = threading.Event()  # while cleared, connections and requests are taken and not answered
        self.answering.set()
        self.failing = 0  # HTTP status of every answer
        self.forbidden: set[str] = set()  # methods that are answered with 403, as without the right in a ClusterRole
        self.conflicts = 0  # so many next changes of Pods find that somebody was quicker
        self.expired_before = 0  # resourceVersions below are answered 410
        self.page_limit = 100
        self.bookmark_seconds = 60.0
        self._version = 100
        self._lock = threading.RLock()
        self._history: list[tuple[str, Json]] = []  # with the path of the collection
        self._old: tuple[str, list[Json]] | None = None
        self._watches: dict[queue.Queue[Json | None], str] = {}  # path of the collection
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
        self._server = _Server((self.address, self.port), handler_of(self))
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
            self._publish(PODS, "MODIFIED" if old else "ADDED", stored)
            return stored  # type: ignore[no-any-return]

    def delete(self, namespace: str, name: str) -> None:
        """Remove a Pod."""
        with self._lock:
            gone = self.pods.pop((namespace, name))
            gone["metadata"]["resourceVersion"] = self._next()
            self._publish(PODS, "DELETED", gone)

    def put_daemonset(self, namespace: str, name: str, **metadata: Any) -> Json:
        """Create or change one; `deletionTimestamp` says that it waits for its pods to go."""
        with self._lock:
            old = self.daemonsets.get((namespace, name))
            known = {"name": name, "namespace": namespace, "uid": str(uuid.uuid4())}
            known |= (old or {}).get("metadata", {}) | {"resourceVersion": self._next()}
            made = {"kind": "DaemonSet", "metadata": known | metadata, "spec": {}, "status": {}}
            self.daemonsets[namespace, name] = made
            self._publish(_daemonsets(namespace), "MODIFIED" if old else "ADDED", made)
            return made

    def delete_daemonset(self, namespace: str, name: str) -> None:
        """Remove one."""
        with self._lock:
            gone = self.daemonsets.pop((namespace, name))
            gone["metadata"]["resourceVersion"] = self._next()
            self._publish(_daemonsets(namespace), "DELETED", gone)

    def put_namespace(self, name: str, labels: dict[str, str] | None = None) -> Json:
        """Create a namespace, or give it other labels."""
        with self._lock:
            metadata = {"name": name, "labels": dict(labels or {}), "resourceVersion": self._next()}
            made = {"kind": "Namespace", "metadata": metadata, "spec": {}, "status": {"phase": "Active"}}
            old, self.namespaces[name] = self.namespaces.get(name), made
            self._publish(NAMESPACES, "MODIFIED" if old else "ADDED", made)
            return made

    def delete_namespace(self, name: str) -> None:
        """Remove one."""
        with self._lock:
            gone = self.namespaces.pop(name)
            gone["metadata"]["resourceVersion"] = self._next()
            self._publish(NAMESPACES, "DELETED", gone)

    def drop_watches(self) -> None:
        """End every watch in the middle."""
        with self._lock:
            for each in self._watches:
                each.put(None)

    def bookmark(self) -> None:
        """Send a bookmark on every watch."""
        with self._lock:
            thing = {"metadata": {"resourceVersion": self._next()}}
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
        """How many watches of Pods are open."""
        return self._watchers(PODS)

    def daemonset_watchers(self, namespace: str) -> int:
        """How many watches of DaemonSets are open."""
        return self._watchers(_daemonsets(namespace))

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

    def _watchers(self, path: str) -> int:
        with self._lock:
            return list(self._watches.values()).count(path)

    def _count(self, counter: Counter[Any], what: object) -> None:
        with self._lock:
            counter[what] += 1

    def _next(self) -> str:
        self._version += 1
        return str(self._version)

    def _publish(self, path: str, kind: str, thing: Json) -> None:
        change = {"type": kind, "object": json.loads(json.dumps(thing))}
        self._history.append((path, change))
        for each, watched in self._watches.items():
            if watched == path:
                each.put(change)


def _daemonsets(namespace: str) -> str:
    return f"/apis/apps/v1/namespaces/{namespace}/daemonsets"


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
