"""Which cgroup is the proxy's container in? For Pods that ask for a strict proxy.

At ADD there is no container yet. Its id comes with the Pod's status, and runtimes name the container's cgroup after it,
so the two are looked for until they are there, and again, as a container that is restarted is another one.
"""

import os
from pathlib import Path

import structlog

from bpf.layout import Cookie, PodFlags, Quad
from bpf.tables import Tables
from cni.policy.pod import Pod, PodSource

log = structlog.get_logger("containers")


class StrictProxies:
    """The proxies table: netns cookie → cgroup id of the pod's proxy container."""

    def __init__(self, pods: PodSource, tables: Tables, cgroup: Path) -> None:
        """`cgroup` is the cgroup2 directory below which all pods are."""
        self._pods = pods
        self._tables = tables
        self._cgroup = cgroup
        self._known: dict[int, str] = {}  # cookie → container id that the table has the cgroup of

    def refresh(self) -> bool:
        """Look for the proxies of all strict pods; False when there is no such pod. Each takes one look at its Pod."""
        strict = {
            key.cookie: (entry.namespace.decode(), entry.name.decode(), entry.uid.decode())
            for key, entry in self._tables.pods.every()
            if entry.flags & PodFlags.STRICT
        }
        self._known = {cookie: container for cookie, container in self._known.items() if cookie in strict}
        # not find(), which asks the API server for what it does not know: this is done several times a second
        known = (self._pods.every() or []) if strict else []
        for cookie, (namespace, name, uid) in strict.items():
            for pod in known:
                if (pod.namespace, pod.name) == (namespace, name) and (pod.uid or uid) == uid:
                    self._confirm(cookie, pod)
        return bool(strict)

    def _confirm(self, cookie: int, pod: Pod) -> None:
        container = pod.proxy_container_id
        if container is None or self._known.get(cookie) == container:
            return
        directory = find_cgroup(self._cgroup, container)
        if directory is None:
            return
        self._tables.proxies.put(Cookie(cookie), Quad(directory.stat().st_ino))
        self._known[cookie] = container
        log.info("proxy.confirmed", pod=f"{pod.namespace}/{pod.name}", container=container, cgroup=str(directory))


def find_cgroup(root: Path, container_id: str) -> Path | None:
    """The cgroup of a container: below `root`, named after its id, alone or as in `cri-containerd-<id>.scope`."""
    for directory, below, _ in os.walk(root):
        for name in below:
            if container_id in name:
                return Path(directory) / name
    return None
