"""`sidestep pods`: what the kernel has of each pod, and how its Pod has changed since."""

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from bpf.pins import Pins
from bpf.tables import Tables
from tests.lab.apiserver import ApiServer
from tests.lab.chain import CniFailed
from tests.lab.levels import set_level
from tests.lab.node import NODE_NAME, Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.sidestep import document, sidestep
from tests.node.test_status import status

TRAFFIC = "traffic.sidecar.istio.io/"
ANNOTATIONS = {
    f"{TRAFFIC}excludeOutboundPorts": "22,15020,22",
    f"{TRAFFIC}includeOutboundIPRanges": "10.0.0.0/8,10.9.0.0/16,fd00::/8",
    "sidestep.io/deny-outbound-ports": "25",
}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        made.pod("alpha", annotations=ANNOTATIONS)
        made.pod("beta")
        made.pod("gamma", mesh=False)
        yield made


@pytest.fixture
def alpha(node: Node) -> Iterator[Pod]:
    """Whose manifest is as it was afterwards."""
    pod = node.pods["alpha"]
    yield pod
    rewrite(pod, {})


def rewrite(pod: Pod, annotations: dict[str, str]) -> None:
    """Change the annotations of a Pod that runs."""
    manifest = pod.manifest()
    manifest["metadata"]["annotations"] |= annotations
    (pod.node.pods_dir / f"{pod.name}.yaml").write_text(yaml.safe_dump(manifest))


def test_a_pod_at_level_full_is_warned_of(node: Node) -> None:
    delta = node.pod("delta", annotations={"sidestep.io/acceleration": "full"}, app=False, envoy=False)
    try:
        assert [warning_of(node), "default/delta: " in sidestep(node, "pods").stdout] == ["", False]
        set_level(node, "full")
        warning = warning_of(node)
        assert warning.startswith("programs that stop at a short read may hang")
        assert warning.endswith("docs/acceleration.md#what-an-application-notices-at-full")
        assert f"default/delta: {warning}" in sidestep(node, "pods").stdout.splitlines()
        assert "default/alpha: " not in sidestep(node, "pods").stdout  # the pod allows no more than proxy
        assert f"WARNING: {warning}" in sidestep(node, "pods", "delta").stdout
    finally:
        set_level(node, "off")
        delta.stop()


def warning_of(node: Node) -> str:
    return str(document(node, "pods", "delta")["acceleration"]["warning"])


def test_all_enrolled_pods_are_listed(node: Node) -> None:
    found = document(node, "pods")
    assert [each["pod"] for each in found] == ["default/alpha", "default/beta"]
    assert all(each["differs"] == {"known": True, "reason": "", "changes": []} for each in found)
    table = sidestep(node, "pods").stdout
    (line,) = [line for line in table.splitlines() if " alpha " in line]
    assert line.split()[:3] == ["default", "alpha", "captured"]
    wide = sidestep(node, "pods", "-o", "wide").stdout
    (line,) = [line for line in wide.splitlines() if " alpha " in line]
    assert line.split()[6] == str(node.pods["alpha"].ip4)
    assert line.split()[-4:] == ["listens", "steered", "the", "same"]
    last = [line.strip() for line in table.splitlines()][-2:]
    assert last == [
        "let pass when they were made, so not captured, since the agent started: 1",
        "there is no istio-proxy container: default/gamma",
    ]


def test_the_policy_is_told_in_istios_words(node: Node) -> None:
    policy = document(node, "pods", "alpha")["policy"]
    told = policy["annotations"] | policy["proxy"]
    assert {name.removeprefix(TRAFFIC): told[name] for name in told if name not in policy["defaults"]} == {
        "excludeOutboundPorts": "22,15020",
        "includeOutboundIPRanges": "10.0.0.0/8,fd00::/8",
        "sidestep.io/deny-outbound-ports": "25",
        "ISTIO_DUAL_STACK": "true",
    }
    assert told["securityContext.runAsUser"] == "1337"


def test_listeners_and_counters(node: Node, alpha: Pod) -> None:
    beta = node.pods["beta"]
    before: dict[str, Any] = document(node, "pods", "default/alpha")
    assert alpha.curl(beta.ip4).pod == "beta"
    after: dict[str, Any] = document(node, "pods", "default/alpha")
    assert after["connections"]["outbound"]["captured"] == before["connections"]["outbound"]["captured"] + 1
    assert after["listeners"]["steered_to"] > 0
    assert {"0.0.0.0", "::"} == set(after["listeners"]["listening"]["15006"])
    assert after["addresses"][0] == str(alpha.ip4)
    with Tables(Pins(node.bpffs)) as tables:
        assert after["netns_cookie"] in [key.cookie for key in tables.pods.every_key()]
    text = sidestep(node, "pods", "alpha").stdout
    assert 'policy        traffic.sidecar.istio.io/includeOutboundIPRanges: "10.0.0.0/8,fd00::/8"' in text
    assert "asks for the same" in text


def test_annotations_that_have_changed_apply_to_new_pods_only(node: Node, alpha: Pod) -> None:
    rewrite(alpha, {f"{TRAFFIC}excludeOutboundPorts": "22,80", f"{TRAFFIC}includeInboundPorts": ""})
    differs = document(node, "pods", "alpha")["differs"]
    assert "applies to new pods only" in differs["reason"]
    assert {each["name"]: (each["enrolled"], each["now"]) for each in differs["changes"]} == {
        f"{TRAFFIC}excludeOutboundPorts": ("22,15020", "22,80"),
        f"{TRAFFIC}includeInboundPorts": ("*", ""),
    }
    table = sidestep(node, "pods", "-o", "wide").stdout
    assert [line.split()[-1] for line in table.splitlines() if line.startswith(" default ")] == [
        "different",
        "same",
    ]
    assert "(`sidestep pods NAME` shows it): default/alpha\n" in sidestep(node, "pods").stdout
    text = sidestep(node, "pods", "alpha").stdout
    assert f'Pod now       {TRAFFIC}excludeOutboundPorts: "22,80", enrolled as "22,15020"' in text


def test_another_way_to_write_the_same_is_no_difference(node: Node, alpha: Pod) -> None:
    rewrite(alpha, {f"{TRAFFIC}excludeOutboundPorts": "15020, 22", f"{TRAFFIC}excludeInboundPorts": "15021"})
    assert document(node, "pods", "alpha")["differs"]["changes"] == []


def test_a_pod_that_would_not_be_made_again(node: Node, alpha: Pod) -> None:
    rewrite(alpha, {f"{TRAFFIC}excludeOutboundPorts": "http"})
    reason = document(node, "pods", "alpha")["differs"]["reason"]
    assert reason.startswith("a new pod would be refused: ") and '"http" is not a port' in reason
    rewrite(alpha, {"sidecar.istio.io/inject": "false"})
    reason = document(node, "pods", "alpha")["differs"]["reason"]
    assert reason == "a new pod would not be captured: sidecar.istio.io/inject is false"


def test_pods_that_are_refused_are_listed_with_annotation_time_and_words_until_they_are_enrolled(node: Node) -> None:
    name = f"{TRAFFIC}excludeOutboundPorts"
    assert sidestep(node, "pods", "--refused").stdout == "no pod was refused since the agent started\n"
    pod = Pod(node, "wrong", annotations={name: "80-90"}, app=False, envoy=False)
    words = f'{name}: "80-90" is not a port; give ports 0–65535 separated by commas'
    with pytest.raises(CniFailed):
        pod.create()
    with pytest.raises(CniFailed):
        node.chain.run("ADD", node.chain.conflist["plugins"][-1], pod.attachment)
    (found,) = document(node, "pods", "--refused")["refused"]
    assert (found["pod"], found["annotation"], found["words"], found["times"]) == ("default/wrong", name, words, 2)
    text = sidestep(node, "pods", "--refused").stdout
    assert text.splitlines() == [
        f"default/wrong, last at {found['at']}, 2 times",
        f"  annotation  {name}",
        f"  refused     {words}",
    ]
    below = "refused by the agent, so they don't start: 1; `sidestep pods --refused` shows why"
    assert below in sidestep(node, "pods").stdout.splitlines()
    said = sidestep(node, "pods", "wrong")
    assert (said.returncode, said.stderr) == (1, f"sidestep: default/wrong was refused at {found['at']}: {words}\n")
    told = status(node)["verdict"]["findings"]
    assert [(each["state"], each["what"]) for each in told] == [
        ("note", f"refused, so they don't start: default/wrong: {words}")
    ]
    rewrite(pod, {name: "80"})
    node.chain.delete(pod.attachment)
    result = node.chain.add(pod.attachment)
    assert document(node, "pods", "--refused")["refused"] == []
    node.chain.delete(pod.attachment, result)
    (node.pods_dir / "wrong.yaml").unlink()
    subprocess.run(["ip", "netns", "del", pod.netns.name], check=True)


def test_without_the_agent_it_is_unknown_who_was_refused(node: Node) -> None:
    node.agent.kill()
    away = f"{node.run_dir}/cni.sock: nobody is there"
    assert sidestep(node, "pods", "--refused").stdout == f"refused pods: not known: {away}\n"
    node.agent.start()


def test_denied_ports_follow_while_the_pod_runs(node: Node, alpha: Pod) -> None:
    rewrite(alpha, {"sidestep.io/deny-outbound-ports": "26"})

    def told() -> Any:
        return document(node, "pods", "alpha")

    wait_until(lambda: told()["policy"]["annotations"]["sidestep.io/deny-outbound-ports"] == "26", "the denied port")
    assert told()["differs"]["changes"] == []


def test_without_a_source_of_pods_it_says_so_in_a_line_and_goes_on(node: Node) -> None:
    done = sidestep(node, "pods", source=False)
    assert done.returncode == 0
    assert "\nnot compared with the Pod: nowhere to get Pods from; give --pods" in done.stdout
    assert document(node, "pods", "alpha", source=False)["differs"]["known"] is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nobody",), "no enrolled pod is called nobody; enrolled pods: default/alpha, default/beta"),
        (("other/alpha",), "no enrolled pod is called other/alpha"),
        (
            ("alpha", "--bpffs", "/never"),
            "--bpffs /never does not exist; ",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(node: Node, argv: tuple[str, ...], message: str) -> None:
    done = sidestep(node, "pods", *argv)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_api_server_is_asked_and_may_be_away_and_so_may_the_agent() -> None:
    with ApiServer().running() as api, Node(api=api) as node:
        alpha = node.pod("alpha")
        node.agent.terminate()
        kubeconfig = api.kubeconfig(node.directory / "kubeconfig")
        how = ("--kubeconfig", kubeconfig, "--kubernetes-node-name", NODE_NAME)
        assert document(node, "pods", "alpha", *how, source=False)["differs"]["reason"] == ""
        alpha.annotations[f"{TRAFFIC}excludeInboundPorts"] = "9000"
        alpha.publish(phase="Running", podIP=str(alpha.ip4))
        (change,) = document(node, "pods", "alpha", *how, source=False)["differs"]["changes"]
        assert change == {
            "name": f"{TRAFFIC}excludeInboundPorts",
            "enrolled": "15020",
            "now": "9000",
            "applies": "new pods only",
        }
        api.stop()
        differs = document(node, "pods", "alpha", *how, source=False)["differs"]
        assert differs["known"] is False and "cannot be reached" in differs["reason"]
        api.start()


@pytest.mark.parametrize(("program", "state"), [("connect4", "unknown"), ("getsockopt", "captured")])
def test_a_program_that_is_attached_nowhere_is_named_as_in_status(program: str, state: str) -> None:
    with Node() as own:
        own.pod("alpha", app=False)
        own.agent.kill()  # it would attach the program again
        (Pins(own.bpffs).links / program).unlink()
        (words,) = (each["what"] for each in status(own, code=1)["verdict"]["findings"] if each["part"] == "programs")
        listed = sidestep(own, "pods").stdout
        one = sidestep(own, "pods", "alpha").stdout
        (told,) = document(own, "pods")
    assert words == f"{program} not attached"
    assert f"\n{words}: default/alpha; `sidestep status` says what to do\n" in listed
    assert f"\n  state         {state}: {words}\n" in one
    assert (told["state"], told["reason"]) == (state, words)
