"""`make bench-node`: what an agent of a node with 250 pods needs: memory, time until it is ready, load when idle.

The pods are in an API server, as large as Istio's are; half of them are in the mesh. Ready is what /readyz says.
"""

import os
import statistics
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import click

from bpf.attachment import detach
from bpf.pins import Pins
from tests.lab.apiserver import ApiServer
from tests.lab.node import NODE_NAME, Node
from tests.lab.waiting import wait_until

PODS = 250
ROUNDS = 5
IDLE_SECONDS = 20.0
_PORT = 39180


def manifest(number: int) -> dict[str, Any]:
    """A pod with what real ones have: environment, mounts, managedFields; about 15 KiB as JSON."""
    mesh = number % 2 == 0
    env = [{"name": f"VARIABLE_{index}", "value": "x" * 60} for index in range(40)]
    mounts = [{"name": f"volume-{index}", "mountPath": f"/mnt/volume-{index}"} for index in range(12)]
    containers: list[dict[str, Any]] = [{"name": "app", "image": "app:1", "env": env, "volumeMounts": mounts}]
    annotations = {"note": "y" * 500}
    if mesh:
        annotations["sidecar.istio.io/status"] = "{}"
        containers.append({"name": "istio-proxy", "args": ["proxy", "sidecar"], "env": env, "volumeMounts": mounts})
    fields: dict[str, Any] = {f"f:key-{index}": {"f:value": {}} for index in range(150)}
    return {
        "metadata": {
            "name": f"pod-{number}",
            "namespace": "default",
            "uid": str(uuid.uuid4()),
            "annotations": annotations,
            "managedFields": [{"manager": "kubelet", "fieldsV1": fields}],
        },
        "spec": {"nodeName": NODE_NAME, "containers": containers},
        "status": {"phase": "Running", "podIP": f"10.200.{number // 250}.{number % 250 + 1}"},
    }


def resident(pid: int) -> float:
    """MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def processor_seconds(pid: int) -> float:
    """User and system time so far (proc(5), stat, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_ready() -> bool:
    with suppress(URLError, OSError), urlopen(f"http://127.0.0.1:{_PORT}/readyz", timeout=1) as answer:
        return bool(answer.status == 200)
    return False


@click.command()
def bench() -> None:
    """Measure, and say what was aimed at."""
    with ApiServer().running() as api, Node(api=api) as node:
        for number in range(PODS):
            api.put(manifest(number))
        node.agent.terminate()
        node.agent.options += ["--health-port", str(_PORT)]

        def start() -> float:
            started = time.perf_counter()
            node.agent.start()
            wait_until(is_ready, "readiness", 30)
            return time.perf_counter() - started

        cold, warm = [], []
        for _ in range(ROUNDS):
            detach(Pins(node.bpffs))
            cold.append(start())
            node.agent.terminate()
            warm.append(start())
            node.agent.terminate()
        start()
        time.sleep(5)
        before, asked = processor_seconds(node.agent.pid), sum(api.requests.values())
        time.sleep(IDLE_SECONDS)
        idle = (processor_seconds(node.agent.pid) - before) / IDLE_SECONDS
        for what, seconds, aim in (("cold", cold, 4), ("warm", warm, 2)):
            spread = f"{min(seconds):.2f}–{max(seconds):.2f}"
            click.echo(f"  ready, {what}: {statistics.median(seconds):.2f} s ({spread}); aim {aim} s")
        click.echo(f"  resident with {PODS} pods: {resident(node.agent.pid):.1f} MiB; aim 96 MiB")
        click.echo(f"  idle for {IDLE_SECONDS:.0f} s: {idle * 100:.2f} % of a core; aim 0.5 %")
        click.echo(f"  API requests meanwhile: {sum(api.requests.values()) - asked}")


if __name__ == "__main__":
    bench()
