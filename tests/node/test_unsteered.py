"""A pod whose inbound steering is gone: nothing of sidestep's sees what arrives, and every command says so."""

import json
import subprocess
from typing import Any

import pytest

from bpf import syscalls
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from tests.lab.command import sidestep, sidestep_json, tracing
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.sidestep import document
from tests.node.sidestep import sidestep as with_source
from tests.node.test_observation import scrape
from tests.node.test_status import options

WORDS = "not steered: inbound reaches the application"


def unsteer(node: Node, pod: Pod) -> None:
    """Detach the pod's link. Its pin stays, and whoever holds the link goes on doing so."""
    (found,) = [each for each in sidestep_json(node, "pods") if each["pod"] == f"default/{pod.name}"]
    path = Pins(node.bpffs).netns / str(found["netns_cookie"])
    with Descriptor(syscalls.open_pin(path)) as link:
        syscalls.detach_link(link.fd, path)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_every_command_says_that_a_pod_is_not_steered(node: Node, is_pinned: bool) -> None:
    alpha, gamma = node.pod("alpha"), node.pod("gamma", mesh=False)
    beta = node.pod("beta")
    node.agent.kill()
    unsteer(node, alpha)
    if not is_pinned:
        cookie = document(node, "pods", "alpha")["netns_cookie"]
        (Pins(node.bpffs).netns / str(cookie)).unlink()
    alpha.envoy.connections()
    assert gamma.curl(alpha.ip4).pod == "alpha"
    assert alpha.envoy.connections() == []  # which is why it has to be said

    told = sidestep(node, "status", *options(node, 9)[2:])
    assert told.returncode == 1
    assert f"✗ inbound: {WORDS} (1 of 2 pods: default/alpha)" in told.stdout.splitlines()
    states = {each["pod"]: each["steering"] for each in document(node, "pods")}
    assert states == {"default/alpha": "not steered", "default/beta": "steered"}
    assert "not steered" in with_source(node, "pods").stdout
    assert WORDS in with_source(node, "pods", "alpha").stdout

    asked: tuple[Any, ...] = ("explain", "alpha", "--inbound", beta.ip4, "--port", "8080")
    explained = sidestep_json(node, *asked, "--try")
    assert (explained["verdict"], explained["rule"], explained["try"]["agrees"]) == ("direct", "not steered", True)
    assert WORDS in sidestep(node, *asked).stdout
    assert WORDS not in sidestep(node, "explain", "beta", "--inbound", gamma.ip4, "--port", "8080").stdout

    page = sidestep(node, "report", "--seconds", "0.1").stdout
    assert f"{WORDS} (1 of 2 pods: default/alpha)" in page
    report = json.loads(sidestep(node, "report", "--seconds", "0.1", "--output", "json").stdout)
    assert {each["pod"]: each["steering"] for each in report["pods"]} == states

    traced = sidestep(node, "trace", "--seconds", "0.1").stderr.splitlines()
    assert f"sidestep: default/alpha: {WORDS}, and is not traced" in traced
    with tracing(node, "beta"):
        pass  # its first line is "tracing"

    node.agent.start()
    wait_until(lambda: document(node, "pods", "alpha")["steering"] == "steered", "the agent to steer it")
    assert gamma.curl(alpha.ip4).pod == "alpha"
    assert alpha.envoy.next_connection().listener == "inbound"


def test_the_metric_follows_and_a_pod_whose_namespace_is_gone_is_no_open_pod(node: Node) -> None:
    alpha = node.pod("alpha", envoy=False)
    assert scrape(node)["sidestep_pods_not_steered",] == 0
    unsteer(node, alpha)
    assert scrape(node)["sidestep_pods_not_steered",] == 1
    wait_until(lambda: scrape(node)["sidestep_pods_not_steered",] == 0, "the agent to steer it")
    node.agent.kill()
    (alpha.cgroup / "cgroup.kill").write_text("1")
    subprocess.run(["ip", "netns", "del", alpha.netns.name], check=True)
    node.wait_for_dead_links(1)
    found = json.loads(sidestep(node, "status", *options(node, 9)[2:], "--output", "json").stdout)
    assert [each["steering"] for each in found["pods"]] == ["namespace gone"]
    assert {each["part"] for each in found["verdict"]["findings"]} == {"agent"}
