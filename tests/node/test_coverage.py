"""`sidestep coverage`, and what the agent does about what goes past the proxies."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.apiserver import ApiServer
from tests.lab.chain import CniFailed
from tests.lab.command import sidestep, sidestep_json
from tests.lab.node import Node
from tests.lab.pod import APP_PORT
from tests.lab.waiting import wait_until
from tests.node.sidestep import sidestep as commands_sidestep

UNCAPTURED = "sidestep.io/uncaptured"
SEND = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try:
    s.sendto(b"x", (sys.argv[1], int(sys.argv[2])))
    print('"sent"')
except OSError as error:
    print('"%s"' % error.strerror)
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """One pod that excludes a port, one that denies what it has not asked for, and a plain one."""
    with Node() as made:
        made.pod("alpha", annotations={"traffic.sidecar.istio.io/excludeOutboundPorts": "5353"})
        made.pod("beta", annotations={UNCAPTURED: "deny"})
        made.pod("gamma", mesh=False)
        yield made


def coverage(node: Node, name: str) -> dict[str, Any]:
    found = sidestep_json(node, "coverage", name)
    assert isinstance(found, dict)
    return found


@pytest.mark.claim("name remote ends: addresses, ports, user ids and processes' names, never contents")
def test_what_went_past_the_proxy_is_named_with_its_rule_and_annotation(node: Node) -> None:
    alpha, gamma = node.pods["alpha"], node.pods["gamma"]
    alpha.curl(node.pods["beta"].ip4, APP_PORT)
    assert alpha.python(SEND, gamma.ip4, 5353) == "sent"
    found = coverage(node, "alpha")
    rows = {(each["peer"], each["protocol"]): each for each in found["past_the_proxy"]}
    excluded = rows[f"{gamma.ip4}:5353", "udp"]
    assert excluded["rule"] == "O1"
    assert excluded["annotation"]["value"] == "5353"
    assert excluded["process"]["uid"] == 1000 and excluded["process"]["command"].startswith("python3")
    assert found["past"] == 1 and 0 < found["covered"] < 1
    assert found["not_told"] == []
    text = sidestep(node, "coverage", "alpha").stdout
    assert f"{gamma.ip4}:5353" in text and 'excludeOutboundPorts: "5353"' in text


def test_a_pod_that_denies_it_is_refused_and_the_log_says_so(node: Node) -> None:
    beta, gamma = node.pods["beta"], node.pods["gamma"]
    assert beta.python(SEND, gamma.ip4, 443) == "Operation not permitted"
    found = coverage(node, "beta")
    assert [each["annotation"] for each in found["refusals"]] == [{"name": UNCAPTURED, "value": "deny"}]
    assert (found["past"], found["refused"], found["on_uncaptured"]) == (0, 1, "deny")
    wait_until(lambda: "event=traffic.uncaptured" in node.agent.log.read_text(), "the agent to tell of it")
    table = sidestep(node, "coverage").stdout
    assert "default    beta" in table and "deny" in table


def test_explain_says_that_it_is_refused_and_why(node: Node) -> None:
    done = commands_sidestep(node, "explain", "beta", f"{node.pods['gamma'].ip4}:443", "--udp")
    assert "the pod refuses what no annotation asks for" in done.stdout
    assert 'sidestep.io/uncaptured: "deny"' in done.stdout


def test_the_list_is_there_without_the_agent(node: Node) -> None:
    before = coverage(node, "alpha")
    node.agent.terminate()
    try:
        assert coverage(node, "alpha")["past_the_proxy"] == before["past_the_proxy"]
    finally:
        node.agent.start()


def test_the_nodes_default_is_for_pods_that_say_nothing(node: Node) -> None:
    node.agent.terminate()
    node.agent.options = ["--uncaptured", "deny", "--uncaptured-exempt-namespaces", "spared"]
    node.agent.start()
    pods = [
        node.pod("delta", app=False, envoy=False),
        node.pod("epsilon", app=False, envoy=False, annotations={UNCAPTURED: "audit"}),
    ]
    try:
        said = {each["name"]: each["on_uncaptured"] for each in sidestep_json(node, "coverage")}
        assert (said["delta"], said["epsilon"], said["alpha"]) == ("deny", "audit", "allow")
    finally:
        for pod in pods:
            pod.stop()


@pytest.mark.parametrize(("annotations", "reason"), [({UNCAPTURED: "audit"}, "Uncaptured"), ({}, None)])
def test_the_owner_is_told_of_the_first_of_each_kind(annotations: dict[str, str], reason: str | None) -> None:
    with ApiServer().running() as api, Node(api=api) as node:
        pod = node.pod("alpha", annotations=annotations, app=False, envoy=False)
        for port in (443, 514):
            assert pod.python(SEND, "198.18.0.1", port) == "sent"
        wait_until(lambda: coverage(node, "alpha")["past"] == 2, "both datagrams to be counted")
        if reason:
            wait_until(lambda: any(each["reason"] == reason for each in api.events), "the Event")
        told = [each for each in api.events if each["reason"].startswith("Uncaptured")]
        assert [each["reason"] for each in told] == [reason] * bool(reason)
        if told:
            assert told[0]["message"].startswith("went past the proxy: udp to 198.18.0.1:443 by python3")


def test_a_value_that_is_none_of_the_three_is_refused(node: Node) -> None:
    with pytest.raises(CniFailed, match=r'sidestep.io/uncaptured: "never" is not a choice; give allow, audit, deny'):
        node.pod("zeta", annotations={UNCAPTURED: "never"}, app=False, envoy=False)
