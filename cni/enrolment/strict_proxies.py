"""Finds the cgroup of the proxy's container, for Pods that ask for a strict proxy.

At ADD there is no container yet. Its id appears later in the Pod's status, and runtimes name the container's cgroup
after the id. The agent looks until it finds both, and goes on looking, because a restarted container has a new id.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from bpf.layout import Cookie, PodFlags, Quad
from bpf.tables import Tables
from cni.policy.pod import Pod, PodSource

log = structlog.get_logger("containers")


class StrictProxies:
    """The proxies table: netns cookie → cgroup id of the pod's proxy container."""

    def __init__(
        self,
        pods: PodSource,
        tables: Tables,
        places: Callable[[], Iterable[Path]],
        confirmed: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`places` are the cgroup2 directories that have the cgroups of all captured pods below them.

        `confirmed` gets the netns cookie of a pod whose container has become known, or is another one than before. The
        proxy may have begun to listen before.
        """
        self._pods = pods
        self._tables = tables
        self._places = places
        self._confirmed = confirmed
        self._known: dict[int, str] = {}  # netns cookie → id of the container whose cgroup is in the table

    def refresh(self) -> bool:
        """Look once for the proxy containers of all strict pods. Returns False if there is no strict pod."""
        strict = {
            key.cookie: (entry.namespace.decode(), entry.name.decode(), entry.uid.decode())
            for key, entry in self._tables.pods.every()
            if entry.flags & PodFlags.STRICT
        }
        self._known = {cookie: container for cookie, container in self._known.items() if cookie in strict}
        # not find(): it asks the API server about a Pod that it does not know, and this runs several times a second
        known = (self._pods.every() or []) if strict else []
        for cookie, (namespace, name, uid) in strict.items():
            for pod in known:
                if (pod.namespace, pod.name) == (namespace, name) and (pod.uid or uid) == uid:
                    self._confirm(cookie, pod)
        return bool(strict)

    def cgroup_of(self, container: str) -> int:
        """The id of a container's cgroup; 0 if there is none."""
        directory = find_cgroup(self._places(), container) if container else None
        return directory.stat().st_ino if directory else 0

    def _confirm(self, cookie: int, pod: Pod) -> None:
        container = pod.proxy_container_id
        if container is None or self._known.get(cookie) == container:
            return
        directory = find_cgroup(self._places(), container)
        if directory is None:
            return
        self._tables.proxies.put(Cookie(cookie), Quad(directory.stat().st_ino))
        self._known[cookie] = container
        log.info("proxy.confirmed", pod=f"{pod.namespace}/{pod.name}", container=container, cgroup=str(directory))
        self._confirmed(cookie)


def find_cgroup(places: Iterable[Path], container_id: str) -> Path | None:
    """A container's cgroup: the directory below a place with the id in its name, as in `cri-containerd-<id>.scope`."""
    for directory, below, _ in (found for place in places for found in os.walk(place)):
        for name in below:
            if container_id in name:
                return Path(directory) / name
    return None
