"""A load in the cluster: a mesh pod that asks two others, on its own node and across nodes, while things happen."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.bed import NAMESPACE, Bed
from tests.cluster.checks import Check
from tests.cluster.load import client, server
from tests.cluster.pods import PodName
from tests.cluster.sidestep import IMAGE_NAME
from tests.lab.waiting import wait_until

LOAD, NEAR, FAR = (PodName(NAMESPACE, name) for name in ("load", "load-near", "load-far"))
PYTHON = "/opt/venv/bin/python"
PORTS = {"http": server.HTTP, "tcp-lines": server.LINES, "tcp-first": server.FIRST}
_KINDS = {"http": server.HTTP, "lines": server.LINES, "first": server.FIRST}
_FOLDER = Path("/counts")
_MORE = 4  # requests of each flow after something has happened
_SECONDS = 60


@dataclass(frozen=True)
class Counts:
    """Requests of some flows."""

    sent: int
    failed: int
    least: int  # of one flow
    failures: tuple[str, ...] = ()

    @classmethod
    def of(cls, flows: dict[str, Any], since: dict[str, Any]) -> "Counts":
        """What has come since then."""
        fresh = {name: {key: now[key] - since[name][key] for key in ("sent", "failed")} for name, now in flows.items()}
        failures = [f"{name} {words}" for name, now in flows.items() for words in now["failures"]]
        sent, failed = (sum(each[key] for each in fresh.values()) for key in ("sent", "failed"))
        return cls(sent, failed, min(each["sent"] for each in fresh.values()), tuple(failures) if failed else ())


@contextmanager
def load_on(bed: Bed) -> Iterator["Load"]:
    """A load that is answered; its pods are gone afterwards."""
    try:
        yield Load(_start(bed))
    finally:
        bed.pods.delete(LOAD, NEAR, FAR)


class Load:
    """One that runs; kubelet has its files in `folder`, so that reading them takes neither kubelet nor API server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # what failed before the proxies had heard of every pod doesn't count
        wait_until(self._is_at_work, "the load to be answered", _SECONDS)

    def during(self, what: str, event: Callable[[], object], *servers: PodName) -> Check:
        """Have something happen; of requests to `servers`, all by default, none may fail until then and a little later.

        What `event` raises is raised.
        """
        before = self._flow_counts()
        event()
        self.wait_for_more(_MORE, *servers)
        found = self._since(before, servers)
        sentence = f"{found.failed} of {found.sent} requests failed: {what}"
        return Check(sentence, lambda: "; ".join(found.failures) if found.failed else "")

    def wait_for_more(self, requests: int, *servers: PodName) -> None:
        """Until each flow to `servers`, all by default, has sent that many more."""
        before = self._flow_counts()
        wait_until(lambda: self._since(before, servers).least >= requests, "requests to be sent", _SECONDS)

    def opened(self) -> int:
        """How many connections the client has made."""
        return sum(each["opened"] for each in self._flow_counts().values())

    def _since(self, before: dict[str, Any], servers: Iterable[PodName]) -> Counts:
        wanted = {name: now for name, now in self._flow_counts().items() if _asks(name, servers or (NEAR, FAR))}
        return Counts.of(wanted, before)

    def _flow_counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = json.loads((self._folder / client.COUNTS).read_text())
        return counts

    def _is_at_work(self) -> bool:
        counts = self._flow_counts() if (self._folder / client.COUNTS).exists() else {}
        return bool(counts) and all(each["sent"] - each["failed"] >= _MORE for each in counts.values())


def _start(bed: Bed) -> Path:
    """Make its pods and tell the client what to ask; the folder that both ends of this share."""
    here, there = bed.cluster.nodes
    for pod, node in ((NEAR, here), (FAR, there)):
        bed.pods.make(pod, node.name, python("server", server.__file__, probed=server.HTTP), PORTS)
    container = python("client", client.__file__, str(_FOLDER))
    container["volumeMounts"] = [{"name": "counts", "mountPath": str(_FOLDER)}]
    bed.pods.make(LOAD, here.name, container, volumes=[{"name": "counts", "emptyDir": {}}])
    bed.pods.wait_until_ready(NEAR, FAR, LOAD)
    volume = f"pods/{bed.pods.get(LOAD)['metadata']['uid']}/volumes/kubernetes.io~empty-dir/counts"
    folder = here.host.folder("/var/lib/kubelet") / volume
    fresh = folder / f"{client.FLOWS}.new"
    fresh.write_text(json.dumps([flow for pod in (NEAR, FAR) for flow in _flows(pod, bed.pods.ip(pod))]))
    fresh.rename(folder / client.FLOWS)
    return folder


def python(name: str, program: str, *argv: str, probed: int = 0) -> dict[str, Any]:
    """A container that runs a program of this folder; ready when it listens on the port `probed`."""
    container: dict[str, Any] = {
        "name": name,
        "image": IMAGE_NAME,  # it is there, and has a Python
        "imagePullPolicy": "Never",
        "command": [PYTHON, "-c", Path(program).read_text(), *argv],
    }
    if probed:
        container["readinessProbe"] = {"httpGet": {"path": "/", "port": probed}, "periodSeconds": 1}
    return container


def _flows(pod: PodName, ip: str) -> Iterable[dict[str, Any]]:
    """Each kind of request by Service, where the proxies talk mTLS, and by Pod IP, where they don't."""
    for kind, port in _KINDS.items():
        for by, host in (("Service", pod.host), ("Pod IP", ip)):
            if (kind, by) == ("first", "Pod IP"):
                continue  # without mTLS nobody speaks first to a proxy that waits for TLS or not (PERMISSIVE)
            mutual = kind == "http" and by == "Service"
            yield {
                "name": f"{kind} to {pod.name} by {by}",
                "kind": kind,
                "host": host,
                "port": port,
                "server": pod.name,
                "identity": LOAD.spiffe if mutual else "",
            }


def _asks(flow: str, servers: Iterable[PodName]) -> bool:
    return any(f" to {server.name} by " in flow for server in servers)
