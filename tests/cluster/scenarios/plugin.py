"""`kubectl sidestep`: one verdict on the cluster, the agent of any pod's node, and a test with pods of its own."""

import tarfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from tests.cluster.bed import CLIENT, FAR, NEAR, PLAIN, Bed
from tests.cluster.checks import Check, equals
from tests.cluster.kubectl_plugin import KubectlPlugin

_TRIALS = 8  # two servers, both ways, by Pod IP and by Service


def checks(bed: Bed) -> Iterator[Check]:
    """It sees what is there, and what is not there."""
    plugin = KubectlPlugin(bed)
    names = [node.name for node in bed.cluster.nodes]
    yield Check(
        "its verdict on a cluster that is well is OK", equals(partial(_verdict, plugin), (0, "ok", ["ok", "ok"]))
    )
    yield Check("it lists the mesh pods of both nodes", partial(_not_listed, plugin))
    for pod in (CLIENT, FAR):
        explained = plugin.run("explain", str(pod), f"{bed.pods.ip(NEAR)}:8080")
        yield Check(f"it has {pod}'s own agent explain", partial(_lacks, explained, "captured"))
    across = plugin.run("explain", str(CLIENT), f"{FAR}:8080")
    for half in (f"{CLIENT}, as {names[0]} has it", f"{FAR}, as {names[1]} has it", "rule I4"):
        yield Check(f"it explains a connection across nodes: {half}", partial(_lacks, across, half))
    for node in names:
        yield Check(f"it runs any command on {node}", partial(_lacks, plugin.run("on", node, "maps"), "pods"))
    yield Check("it has a bug report of each node", partial(_without_report, bed, plugin))
    nobody = plugin.run("explain", "mesh/nobody", "10.0.0.1:80")
    yield Check("a pod that is not there is one line", partial(_lacks, nobody, '"nobody" not found', status=1, lines=1))
    tested = plugin.run("test")
    yield Check("its test finds every connection captured", partial(_lacks, tested, f"{_TRIALS} of {_TRIALS} captured"))
    yield Check("its test tries both nodes", partial(_lacks, tested, f"from {names[0]} to {names[1]}"))
    bare = plugin.run("test", "--label", "istio-injection=disabled")
    yield Check("its test says if pods get no sidecar", partial(_lacks, bare, "got no sidecar", status=1))
    yield from _without_agents(bed, plugin)


def _without_agents(bed: Bed, plugin: KubectlPlugin) -> Iterator[Check]:
    """Pods go on, and the verdict says who is not there."""
    try:
        bed.sidestep.delete()
        yield Check(
            "its verdict without agents is WRONG", equals(partial(_verdict, plugin), (1, "wrong", ["wrong", "wrong"]))
        )
        said = plugin.run("status")
        yield Check("it says what is wrong then", partial(_lacks, said, "no agent runs there", status=1))
        asked = plugin.run("pods", str(CLIENT))
        yield Check("it says that nobody can be asked", partial(_lacks, asked, "no agent runs on", status=1, lines=1))
    finally:
        bed.sidestep.apply()


def _verdict(plugin: KubectlPlugin) -> tuple[int, str, list[str]]:
    """The exit status, the cluster's state, and each node's."""
    told: dict[str, Any] = plugin.told("status")
    return plugin.run("status")[0], told["state"], [each["state"] for each in told["nodes"]]


def _not_listed(plugin: KubectlPlugin) -> str:
    pods = {each["pod"]: each for each in plugin.told("pods", "--all-namespaces")}
    wrong = [str(each) for each in (CLIENT, NEAR, FAR) if pods.get(str(each), {}).get("state") != "captured"]
    return ", ".join(wrong + [str(each) for each in PLAIN if str(each) in pods])


def _without_report(bed: Bed, plugin: KubectlPlugin) -> str:
    """The nodes whose archives lack the verdict or the agent's log."""
    folder = bed.cluster.directory / "bugreports"
    folder.mkdir()
    plugin.run("bugreport", "--directory", str(folder))
    wrong = []
    for node in bed.cluster.nodes:
        name = f"sidestep-bugreport-{node.name}"
        with suppress(OSError, tarfile.TarError, KeyError), tarfile.open(folder / f"{name}.tar.gz") as tar:
            status, log = (tar.extractfile(f"{name}/{each}") for each in ("status.txt", "log.txt"))
            if status and log and status.read().startswith(b"OK") and b"agent.serving" in log.read():
                continue
        wrong.append(node.name)
    return ", ".join(wrong)


def _lacks(told: tuple[int, str], words: str, status: int = 0, lines: int = 0) -> str:
    """All that was said, unless it has the words and ended as wanted; `lines` is how many it may have, 0 for any."""
    ended, said = told
    is_right = ended == status and words in said and (not lines or len(said.splitlines()) == lines)
    return "" if is_right else f"exit status {ended}: {said}"
