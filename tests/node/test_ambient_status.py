"""What an operator is told of pods in ambient mode: by `status`, `pods`, `coverage`, the report and Prometheus."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.ambient import AMBIENT
from tests.lab.chain import CniFailed
from tests.lab.inside import PYTHON
from tests.lab.invocation import sidestep
from tests.lab.node import NODE_NAME
from tests.lab.waiting import wait_until
from tests.node.test_ambient import THROUGH, Bed, bed
from tests.node.test_left_out import with_istios_rules
from tests.node.test_observation import port


@pytest.fixture
def own() -> Iterator[Bed]:
    """Without a ztunnel yet."""
    with bed() as made:
        yield made


def said(own: Bed, command: str, *more: object) -> "subprocess.CompletedProcess[str]":
    """What a command prints, with the settings of the node's agent."""
    node = own.node
    given: list[object] = ["--bpffs", node.bpffs]
    if command in ("status", "pods"):
        given += ["--cni-agent-run-dir", node.run_dir, "--kubeconfig", node.directory / "kubeconfig"]
        given += ["--kubernetes-node-name", NODE_NAME]
    if command == "status":
        given += ["--ambient-enabled", "--health-port", port(node, "health") if node.agent.process else 9]
    return sidestep(command, *more, *given)


def document(own: Bed, command: str, *more: object) -> Any:
    return json.loads(said(own, command, *more, "--output", "json").stdout)


def states(own: Bed, command: str) -> dict[str, str]:
    """The pods' states by name."""
    found = document(own, command)
    return {each["pod"]: each["state"] for each in (found["pods"] if command == "status" else found)}


def findings(own: Bed, code: int) -> list[tuple[str, str, str]]:
    """What `status` finds, with its exit status: state, part and words."""
    done = said(own, "status", "--output", "json")
    assert done.returncode == code, done.stdout + done.stderr
    return [(each["state"], each["part"], each["what"]) for each in json.loads(done.stdout)["verdict"]["findings"]]


def test_a_missing_ztunnel_is_told_once_with_all_pods_that_wait_and_all_is_well_with_one(own: Bed) -> None:
    nobody = f"no ztunnel is connected to {own.socket}"
    assert findings(own, 1) == [("wrong", "ambient", f"{nobody}; pending: no pod yet, but new ones wait")]
    running = own.pod("running")
    own.relabel(running, AMBIENT)
    with pytest.raises(CniFailed):
        own.pod("new", AMBIENT)
    for name in ("running", "new"):
        own.wait_redirection(own.node.pods[name], "pending")
    whole = f"{nobody}; pending: default/new, default/running"
    assert [each for each in findings(own, 1) if each[0] == "wrong"] == [("wrong", "ambient", whole)]
    assert states(own, "status") == {"default/running": "pending"}
    assert states(own, "pods") == {"default/running": "pending", "default/new": "pending"}
    text = said(own, "pods").stdout
    assert f"default/new is not in the mesh yet: {nobody}" in " ".join(text.split())
    assert f"state         pending: {nobody}" in said(own, "pods", "running").stdout
    assert (
        f"default/new is not captured by sidestep (pending): {nobody}"
        in said(own, "pods", "new").stderr.splitlines()[-1]
    ), repr(said(own, "pods", "new").stderr)
    own.node.pods["new"].stop()
    own.ztunnel()
    own.wait_redirection(running, "enabled")
    done = said(own, "status")
    assert "ambient mode: on; one ztunnel is connected; pods: 1 in the mesh, 0 pending" in done.stdout.splitlines()
    assert states(own, "status") == states(own, "pods") == {"default/running": "ambient"}
    assert "ambient" not in [part for _, part, _ in findings(own, done.returncode)]


def test_a_pod_that_ztunnel_refuses_is_named_with_the_reason_and_others_stay_well(own: Bed) -> None:
    own.ztunnel()
    own.pod("well", AMBIENT)
    taken = own.pod("taken")
    listening = taken.popen(
        [
            *PYTHON,
            "import socket, time; s = socket.create_server(('', 15006)); print('ready', flush=True); time.sleep(99)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert listening.stdout.readline() == "ready\n"
        own.relabel(taken, AMBIENT)
        own.wait_redirection(taken, "pending")
        (only,) = [each for each in findings(own, 1) if each[0] == "wrong"]
        assert only[1] == "ambient" and "failure to start proxy" in only[2] and only[2].endswith(": default/taken")
        assert "free ztunnel's ports" in said(own, "status").stdout
        assert states(own, "status") == {"default/well": "ambient", "default/taken": "pending"} == states(own, "pods")
    finally:
        listening.kill()
        listening.communicate()


def test_a_pod_with_the_rules_of_istios_agent_is_pending_and_to_be_created_anew(own: Bed) -> None:
    own.ztunnel()
    held = own.pod("held")
    with_istios_rules(held)
    own.relabel(held, AMBIENT)
    own.wait_redirection(held, "pending")
    (only,) = [each for each in findings(own, 1) if each[0] == "wrong"]
    assert only[1] == "ambient" and only[2].startswith("pending: istio-cni's netfilter rules are in the pod's network")
    assert "→ create the pod anew" in said(own, "status").stdout
    assert states(own, "pods") == {"default/held": "pending"}


def test_without_an_answer_of_the_agent_nobody_calls_ambient_mode_well(own: Bed) -> None:
    own.ztunnel()
    own.pod("alpha", AMBIENT)
    os.kill(own.node.agent.pid, signal.SIGSTOP)
    try:
        found = findings(own, 1)
        assert [part for state, part, _ in found if state == "wrong"] == ["agent"]
        assert "ambient mode: not known: no answer within 3 s" in said(own, "status").stdout.splitlines()
    finally:
        os.kill(own.node.agent.pid, signal.SIGCONT)
    own.node.agent.kill()
    found = findings(own, 1)
    assert [part for state, part, _ in found if state == "wrong"] == ["agent"]
    assert "ambient mode: not known: nobody is there" in said(own, "status").stdout.splitlines()


def test_coverage_takes_ztunnel_for_the_pods_proxy_and_names_the_annotation_that_bypasses_it(own: Bed) -> None:
    own.ztunnel()
    alpha, beta = own.pod("alpha", AMBIENT), own.pod("beta", AMBIENT)
    assert own.way(alpha, beta) == THROUGH
    found = {each["pod"]: each for each in document(own, "coverage")}
    for name in ("default/alpha", "default/beta"):
        assert (found[name]["covered"], found[name]["past_the_proxy"], found[name]["refusals"]) == (1.0, [], [])
    plain = own.pod("plain", annotations={"ambient.istio.io/bypass-inbound-capture": "true"})
    own.relabel(plain, AMBIENT)
    own.wait_redirection(plain, "enabled")
    outside = own.pod("outside")
    assert own.way(outside, plain) == ["app"]
    (past,) = document(own, "coverage", "plain")["past_the_proxy"]
    assert past["annotation"] == {"name": "ambient.istio.io/bypass-inbound-capture", "value": "true"}
    own.ztunnels[0].kill()
    own.ztunnels[0].wait()
    wait_until(lambda: states(own, "status")["default/alpha"] == "pending", "ztunnel's end to be seen")
    assert document(own, "status")["ambient"]["pods"][0] == {
        "pod": "default/alpha",
        "uid": alpha.uid,
        "state": "pending",
        "reason": f"no ztunnel is connected to {own.socket}",
    }
    assert own.way(outside, alpha) == ["Connection refused"]
    (refused,) = document(own, "coverage", "alpha")["refusals"]
    assert (refused["way"], refused["why"], refused["annotation"]) == (
        "in",
        "it is captured, but ztunnel did not have the pod",
        None,
    )
    words = document(own, "pods", "alpha")["proxy"]["words"]
    assert words == "ztunnel does not have the pod, so its connections are refused"
