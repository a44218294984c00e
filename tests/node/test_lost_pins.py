"""Somebody removes pins, or the bpffs. The agent holds what was pinned: nothing opens, and everything comes back."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable

import pytest

from bpf.pins import Pins
from tests.lab.command import sidestep, sidestep_json, tracing
from tests.lab.levels import start_agent
from tests.lab.node import Node
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh
from tests.node.sidestep import document
from tests.node.test_observation import scrape
from tests.node.test_status import status
from tests.node.test_top import shown


def remove_all(pins: Pins) -> None:
    shutil.rmtree(pins.top)


def unmount(pins: Pins) -> None:
    subprocess.run(["umount", "--lazy", pins.bpffs], check=True)  # the agent has it open


def pinned(pins: Pins) -> set[str]:
    try:
        return {str(path.relative_to(pins.top)) for path in pins.top.rglob("*")}
    except FileNotFoundError:  # none at all, or those that are just being replaced
        return set()


@pytest.mark.claim("files that root removes end no capture then")
@pytest.mark.parametrize("lose", [remove_all, unmount])
def test_nothing_opens_when_pins_go_and_all_come_back(node: Node, lose: Callable[[Pins], None]) -> None:
    alpha, gamma = node.pod("alpha"), node.pod("gamma", mesh=False)
    pins = Pins(node.bpffs)
    before, links = pinned(pins), alpha.node.entries()["links"]
    alpha.envoy.connections()
    os.kill(node.agent.pid, signal.SIGSTOP)  # it can't put anything back meanwhile
    lose(pins)
    assert gamma.curl(alpha.ip4).pod == "alpha"
    assert alpha.envoy.next_connection().listener == "inbound"
    assert alpha.curl(gamma.ip4).pod == "gamma"
    assert alpha.envoy.next_connection().listener == "outbound"
    os.kill(node.agent.pid, signal.SIGCONT)
    wait_until(lambda: pinned(pins) == before, "every pin", 30)
    assert node.entries()["links"] == links
    assert "event=pins.restored" in node.agent.log.read_text()
    assert status(node)["open_pods"] == []
    node.agent.kill()  # from here on the pins alone hold everything
    assert gamma.curl(alpha.ip4).pod == "alpha"
    assert alpha.envoy.next_connection().listener == "inbound"


def test_an_agent_that_ends_puts_back_what_was_removed_a_moment_ago(node: Node) -> None:
    alpha, gamma = node.pod("alpha"), node.pod("gamma", mesh=False)
    pins = Pins(node.bpffs)
    before = pinned(pins) - {"holder"}
    remove_all(pins)
    node.agent.terminate()
    # what belongs to the next attach is not there
    assert before - pinned(pins) <= {
        f"{pins.root.name}/{each}" for each in ("maps/build", "places", "programs/iterator")
    }
    alpha.envoy.connections()
    assert gamma.curl(alpha.ip4).pod == "alpha"
    assert alpha.envoy.next_connection().listener == "inbound"
    assert alpha.curl(gamma.ip4).pod == "gamma"
    assert alpha.envoy.next_connection().listener == "outbound"
    node.agent.start()
    assert status(node)["open_pods"] == []


def test_the_message_program_comes_back_and_is_never_taken_for_somebody_elses(node: Node) -> None:
    node.agent.terminate()
    start_agent(node, "proxy")
    message = Pins(node.bpffs).programs / "message"
    message.unlink()
    said = sidestep(node, "accelerate", "proxy", "--cni-agent-run-dir", node.run_dir)
    assert said.stdout.split()[:2] == ["acceleration:", "proxy"]
    wait_until(message.exists, "the pin")
    node.agent.terminate()
    message.unlink()
    assert sidestep_json(node, "attach", "--cgroup", node.kubepods)["restored"] == ["programs/message"]
    assert message.exists()


def test_attach_restores_steering_and_says_so(node: Node) -> None:
    alpha, gamma = node.pod("alpha"), node.pod("gamma", mesh=False)
    node.agent.terminate()
    pins = Pins(node.bpffs)
    (pins.netns / str(document(node, "pods", "alpha")["netns_cookie"])).unlink()
    (pins.links / "connect4").unlink()
    said = sidestep(node, "attach", "--cgroup", node.kubepods)
    assert said.stdout.splitlines()[1] == "restored: links/connect4, the steering of default/alpha"
    assert gamma.curl(alpha.ip4).pod == "alpha"
    assert alpha.envoy.next_connection().listener == "inbound"
    assert sidestep_json(node, "attach", "--cgroup", node.kubepods)["restored"] == []


def test_detach_ends_capture_although_the_agent_holds_the_links(node: Node) -> None:
    alpha, gamma = node.pod("alpha"), node.pod("gamma", mesh=False)
    alpha.envoy.connections()
    os.kill(node.agent.pid, signal.SIGSTOP)
    try:
        assert sidestep(node, "detach", "--end-capture").returncode == 0
        assert gamma.curl(alpha.ip4).pod == "alpha"
        assert alpha.curl(gamma.ip4).pod == "gamma"
        assert alpha.envoy.connections() == []
    finally:
        os.kill(node.agent.pid, signal.SIGCONT)
    wait_until(lambda: scrape(node)["sidestep_attached",] == 1, "the agent to attach again", 60)


def test_trace_and_top_go_on_when_the_programs_are_attached_anew(node: Node) -> None:
    alpha, gamma = node.pod("alpha"), node.pod("gamma", mesh=False)
    with (
        tracing(node, "--verdict", "captured", "--output", "json") as trace,
        shown(Mesh(node, alpha, alpha, gamma)) as terminal,
    ):
        assert trace.stdout is not None and trace.stderr is not None
        terminal.shows("default/alpha", "sidestep attached")
        alpha.curl(gamma.ip4)
        assert json.loads(trace.stdout.readline())["pod"] == "default/alpha"
        node.agent.terminate()
        assert sidestep(node, "detach", "--end-capture").returncode == 0
        terminal.shows("NOT ATTACHED")
        assert trace.stderr.readline() == "sidestep: nothing is attached; the trace waits 30 s for it\n"
        node.agent.start()
        assert trace.stderr.readline() == "sidestep: the programs were attached anew, and the trace goes on\n"
        beta = node.pod("beta")
        terminal.shows("default/beta", "sidestep attached")
        beta.curl(gamma.ip4)
        assert json.loads(trace.stdout.readline())["pod"] == "default/beta"
        terminal.press(b"q")
        assert terminal.ends() == 0


def test_a_trace_ends_if_nothing_is_attached_for_long(node: Node) -> None:
    with tracing(node) as trace:
        node.agent.terminate()
        assert sidestep(node, "detach").returncode == 0
        assert trace.wait(45) == 1
        assert trace.stderr is not None
        first, closing, last = trace.stderr.read().splitlines()
    assert first == "sidestep: nothing is attached; the trace waits 30 s for it"
    assert closing == "traced: 0 events, 0 lost"
    assert last.startswith(f"sidestep: nothing is attached: --bpffs {node.bpffs} has no {Pins(node.bpffs).root}; ")
