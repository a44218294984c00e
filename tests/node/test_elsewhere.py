"""Pods whose cgroup is not below the first attach point: the agent attaches there too, or the pod is refused."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bpf.kernel import cgroup2_root
from bpf.pins import Pins
from tests.lab import invocation
from tests.lab.apiserver import ApiServer
from tests.lab.chain import CniFailed
from tests.lab.node import REPOSITORY, Node
from tests.lab.ownroot import rooted_at, seen_as
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.test_takeover import CHANGES, another_version

BURSTABLE = Path("kubepods.slice", "kubepods-burstable.slice")


def choosing(node: Node) -> Node:
    """A node whose cgroup is the root of cgroup2 for the agent, which is not told where to attach."""
    node.agent.chooses, node.cgroup_root = True, node.cgroup
    node.agent_wrapper = list(rooted_at(node.cgroup))
    return node


@pytest.fixture
def node() -> Iterator[Node]:
    with choosing(Node()) as node:
        yield node


def sidestep(node: Node, command: str, *options: object) -> str:
    done = invocation.sidestep(command, "--bpffs", node.bpffs, *options, columns=400, through=rooted_at(node.cgroup))
    return done.stdout


def seen(node: Node, *names: str) -> list[str]:
    return [str(seen_as(node.cgroup, node.cgroup / name)) for name in names]


def places(node: Node) -> list[str]:
    """Where the programs are attached, in working order, with the agent's maps: all of its pods are in them."""
    found = json.loads(sidestep(node, "status", "--output", "json"))
    mesh = sorted(f"default/{pod.name}" for pod in node.pods.values() if pod.mesh and pod.result)
    if not found["attached"] or [each["pod"] for each in found["pods"]] != mesh:
        return []
    return [found["attach_point"], *found["further_places"]]


def is_captured(pod: Pod, other: Pod) -> bool:
    pod.envoy.connections()
    for ip in other.ips:
        assert pod.curl(ip).pod == other.name
        if pod.envoy.next_connection().listener != "outbound":
            return False
    return True


def in_a_slice(node: Node, name: str) -> Path:
    """The cgroup of a pod of a kubelet that uses the systemd driver."""
    return node.cgroup / BURSTABLE / f"kubepods-burstable-pod_{name}.slice"


@pytest.mark.claim("the agent attaches them there before the pod starts")
def test_a_pod_in_another_tree_is_captured_there(node: Node) -> None:
    """Kubelet changed its cgroup driver, say, after the agent had started."""
    gamma, alpha = node.pod("gamma", mesh=False), node.pod("alpha")
    assert places(node) == seen(node, "kubepods")
    beta = node.pod("beta", cgroup=in_a_slice(node, "beta"))
    assert is_captured(beta, gamma)
    assert is_captured(alpha, gamma)
    assert places(node) == seen(node, "kubepods", "kubepods.slice")
    assert f"programs: attached at {' and '.join(places(node))}\n" in sidestep(node, "status")
    assert "event=programs.extended" in node.agent.log.read_text()
    delta = node.pod("delta", cgroup=in_a_slice(node, "delta"))
    assert is_captured(delta, gamma)
    assert node.agent.log.read_text().count("event=programs.extended") == 1


def test_what_crio_writes_is_understood(node: Node) -> None:
    gamma = node.pod("gamma", mesh=False)
    alpha = Pod(node, "alpha", cgroup=in_a_slice(node, "alpha"))
    alpha.cgroup_path = alpha.cgroup.name
    node.pods["alpha"] = alpha
    alpha.create()
    assert is_captured(alpha, gamma)


def refusal(node: Node, name: str, cgroup: Path, path: str = "") -> str:
    """The error of a pod's ADD, which leaves nothing behind."""
    pod = Pod(node, name, cgroup=cgroup)
    pod.cgroup_path = path or pod.cgroup_path
    node.pods[name] = pod
    with pytest.raises(CniFailed) as refused:
        pod.create()
    assert refused.value.code == 11
    entries = node.entries()
    assert not any(entries[table] for table in ("pods", "addresses", "links"))
    return refused.value.message


def test_nothing_is_attached_at_the_root_by_guess(node: Node) -> None:
    told = refusal(node, "alpha", node.cgroup / "elsewhere", "/")
    root, place = str(cgroup2_root()), seen(node, "kubepods")[0]
    assert told.startswith(f"default/alpha would run uncaptured: its cgroup {root} is not below {place}, where the")
    assert "unless --cgroup says so" in told


def test_a_tree_that_is_not_there_is_refused_with_both_paths(node: Node) -> None:
    told = refusal(node, "alpha", node.cgroup / "elsewhere", "/foo/kubepods/pod1")
    missing, place = seen(node, "foo/kubepods/pod1", "kubepods")
    assert f"its cgroup {missing} is not below {place}, where the programs are attached" in told
    assert told.endswith("foo/kubepods does not exist")


def test_a_cgroup_that_is_not_made_yet_is_captured_if_it_will_be_below(node: Node) -> None:
    gamma = node.pod("gamma", mesh=False)
    alpha = Pod(node, "alpha")
    alpha.cgroup_path = "/kubepods/later/alpha"
    node.pods["alpha"] = alpha
    alpha.create()
    assert is_captured(alpha, gamma)


def test_a_given_cgroup_rules_and_pods_elsewhere_are_refused_with_both_paths() -> None:
    with Node() as node:
        elsewhere = in_a_slice(node, "alpha")
        told = refusal(node, "alpha", elsewhere)
        assert f"its cgroup {elsewhere} is not below {node.kubepods}, where the programs are attached" in told
        assert f"--cgroup says {node.kubepods}; give a cgroup above both, or leave the setting out" in told
        found = json.loads(invocation.sidestep("status", "--bpffs", node.bpffs, "--output", "json").stdout)
        assert (found["attach_point"], found["further_places"]) == (str(node.kubepods), [])


def test_a_detached_link_is_told_as_such_and_the_next_try_succeeds(node: Node) -> None:
    gamma, alpha = node.pod("gamma", mesh=False), node.pod("alpha", cgroup=in_a_slice(node, "alpha"))
    plugin, wanted = node.chain.conflist["plugins"][-1], places(node)
    os.kill(node.agent.pid, signal.SIGSTOP)
    (Pins(node.bpffs).places / "kubepods%2Eslice" / "connect4").unlink()
    asked = Thread(target=lambda: os.kill(node.agent.pid, signal.SIGCONT))
    asked.start()
    try:
        node.chain.run("ADD", plugin, alpha.attachment, alpha.result)
    except CniFailed as refused:
        assert (refused.code, "the agent is attaching them again" in refused.message) == (11, True)
    asked.join()
    wait_until(lambda: places(node) == wanted, "both places", 60)
    node.chain.run("ADD", plugin, alpha.attachment, alpha.result)
    assert is_captured(alpha, gamma)


def lose_pins_of_further_places(node: Node) -> None:
    shutil.rmtree(Pins(node.bpffs).places)


def detach(node: Node) -> None:
    sidestep(node, "detach")


@pytest.mark.parametrize("lose", [lose_pins_of_further_places, detach])
def test_a_further_place_that_somebody_removes_comes_back(node: Node, lose: Any) -> None:
    gamma, beta = node.pod("gamma", mesh=False), node.pod("beta", cgroup=in_a_slice(node, "beta"))
    node.pod("alpha")
    wanted = seen(node, "kubepods", "kubepods.slice")
    assert places(node) == wanted
    lose(node)
    wait_until(lambda: places(node) == wanted, "both places", 60)
    assert is_captured(beta, gamma)
    node.agent.kill()  # from here on the pins alone hold everything
    assert is_captured(beta, gamma)


def test_the_next_agent_keeps_every_place_while_pods_are_there(node: Node) -> None:
    gamma, beta = node.pod("gamma", mesh=False), node.pod("beta", cgroup=node.cgroup / "odd" / "beta")
    assert places(node) == seen(node, "kubepods", "odd")
    node.agent.terminate()
    node.agent.start()
    assert places(node) == seen(node, "kubepods", "odd")
    assert is_captured(beta, gamma)


def test_another_layout_takes_over_at_every_place_and_back(tmp_path: Path) -> None:
    other = another_version(tmp_path, CHANGES["a constant"])
    with ApiServer().running() as api, choosing(Node(api=api)) as node:
        gamma, beta = node.pod("gamma", mesh=False), node.pod("beta", cgroup=node.cgroup / "odd" / "beta")
        wanted = seen(node, "kubepods", "odd")
        assert places(node) == wanted
        layouts = node.bpffs / "sidestep"
        for source in (other, REPOSITORY):
            node.agent.terminate()
            node.agent.start(source)
            wait_until(lambda: len(list(layouts.glob("v*/maps"))) == 1, "one layout to be left", 20)
            assert is_captured(beta, gamma)
        assert sorted(places(node)) == sorted(wanted)
