"""Pods in ambient mode on a node: the real agent and plugin, an API server, and a double of ztunnel as a process."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.lab.ambient import AMBIENT, REDIRECTION
from tests.lab.apiserver import ApiServer
from tests.lab.chain import CniFailed
from tests.lab.inside import PYTHON, popen
from tests.lab.node import NODE_NAME, REPOSITORY, Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until

PORT = 7000
# greets with a line of JSON that says who it is and whom it sees
_SERVER = f"""
import json, socket
listener = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True:
    client, peer = listener.accept()
    client.sendall(json.dumps({{"who": "app", "peer": peer[0].removeprefix("::ffff:")}}).encode() + b"\\n")
    client.close()
"""
_CLIENT = """
import json, socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as server:
        print(server.makefile().readline() or "null")
except OSError as error:
    print(json.dumps({"error": error.strerror or str(error)}))
"""


class Bed:
    """A node in ambient mode, and its ztunnels."""

    def __init__(self, node: Node, api: ApiServer) -> None:
        self.node, self.api = node, api
        self.socket = node.directory / "ztunnel" / "ztunnel.sock"
        self.ztunnels: list[subprocess.Popen[str]] = []
        self._servers: dict[str, subprocess.Popen[str]] = {}

    def ztunnel(self) -> "subprocess.Popen[str]":
        """One more, in a pod of its own."""
        before = self.logged("ztunnel.synced")
        cgroup = self.node.kubepods / f"ztunnel-{len(self.ztunnels)}"
        cgroup.mkdir()
        process: subprocess.Popen[str] = popen(
            self.node.netns,
            cgroup,
            [sys.executable, "-m", "tests.lab.zds_process", str(self.socket)],
            0,
            0,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ztunnels.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        self.wait_synced(before)
        return process

    def wait_synced(self, before: int) -> None:
        """Wait for one more snapshot than there were."""
        wait_until(lambda: self.logged("ztunnel.synced") > before, "ztunnel to come again", 30)

    def logged(self, event: str) -> int:
        return self.node.agent.log.read_text().count(event)

    def pod(self, name: str, labels: dict[str, str] | None = None, **options: Any) -> Pod:
        """A pod without a sidecar, with a server."""
        pod = self.node.pod(name, mesh=False, app=False, labels=labels, **options)
        server = pod.popen([*PYTHON, _SERVER], stdout=subprocess.PIPE, text=True)
        assert server.stdout.readline() == "ready\n"
        self._servers[name] = server
        return pod

    def stop(self, *pods: Pod) -> None:
        """End pods; the plugin's DEL comes while the server still runs."""
        for pod in pods:
            pod.stop()
            if server := self._servers.pop(pod.name, None):
                server.kill()
                server.communicate()

    def relabel(self, pod: Pod, labels: dict[str, str]) -> None:
        pod.labels = labels
        pod.publish(phase="Running", podIP=str(pod.ip4))

    def redirection(self, pod: Pod) -> str | None:
        metadata = self.api.pods["default", pod.name]["metadata"]
        found: str | None = (metadata.get("annotations") or {}).get(REDIRECTION)
        return found

    def wait_redirection(self, pod: Pod, state: str | None) -> None:
        wait_until(lambda: self.redirection(pod) == state, f"{pod.name} to be {state}, not {self.redirection(pod)}", 30)

    def way(self, source: Pod, target: Pod, family: int = 4) -> list[str]:
        """Who has passed a connection on, and who has got it."""
        said = source.python(_CLIENT, target.ip4 if family == 4 else target.ip6, PORT)
        found = []
        while said and "who" in said:
            found.append(said["who"])
            self.seen, said = said, said.get("then")
        return found if found else [str(said and said.get("error"))]


@contextmanager
def bed() -> Iterator[Bed]:
    with ApiServer().running() as api:
        api.put_namespace("default")
        node = Node(api=api)
        made = Bed(node, api)
        node.agent.options = ["--ambient-enabled", "--ztunnel-uds-address", made.socket]
        with node:
            try:
                yield made
            finally:
                for each in (*made.ztunnels, *made._servers.values()):
                    each.kill()
                    each.communicate()


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    """For tests that leave it as they found it, with a ztunnel."""
    with bed() as made:
        made.ztunnel()
        yield made


@pytest.fixture
def own() -> Iterator[Bed]:
    """Without a ztunnel yet."""
    with bed() as made:
        yield made


THROUGH = ["ztunnel-outbound", "ztunnel-inbound", "app"]


def test_new_pods_talk_through_ztunnel_in_both_families_and_plain_pods_do_not(shared: Bed) -> None:
    alpha, beta, plain = shared.pod("alpha", AMBIENT), shared.pod("beta", AMBIENT), shared.pod("plain")
    try:
        assert shared.redirection(alpha) == shared.redirection(beta) == "enabled"
        for family in (4, 6):
            assert shared.way(alpha, beta, family) == THROUGH
            assert shared.seen["peer"] == str(alpha.ip4 if family == 4 else alpha.ip6), "the client's own address"
        assert shared.way(plain, beta) == ["ztunnel-inbound", "app"]
        assert shared.way(alpha, plain) == ["ztunnel-outbound", "app"]
        assert shared.way(plain, plain) == ["app"]
        assert shared.redirection(plain) is None
        shared.node.chain.check(alpha.attachment, alpha.result or {})
    finally:
        shared.stop(alpha, beta, plain)


def test_running_pods_come_in_and_leave_with_their_labels_and_their_namespaces(shared: Bed) -> None:
    gamma, delta = shared.pod("gamma"), shared.pod("delta")
    try:
        assert shared.way(gamma, delta) == ["app"]
        shared.relabel(gamma, AMBIENT)
        shared.wait_redirection(gamma, "enabled")
        assert shared.way(gamma, delta) == ["ztunnel-outbound", "app"]
        shared.api.put_namespace("default", AMBIENT)
        shared.wait_redirection(delta, "enabled")
        assert shared.way(gamma, delta) == THROUGH
        shared.relabel(gamma, {"istio.io/dataplane-mode": "none"})
        shared.wait_redirection(gamma, None)
        assert shared.way(gamma, delta) == ["ztunnel-inbound", "app"]
        shared.api.put_namespace("default")
        shared.wait_redirection(delta, None)
        assert shared.way(gamma, delta) == ["app"]
    finally:
        shared.api.put_namespace("default")
        shared.stop(gamma, delta)


def test_a_del_leaves_nothing_in_the_maps_and_frees_the_namespace(shared: Bed) -> None:
    before = shared.node.policies()
    epsilon = shared.pod("epsilon", AMBIENT)
    assert shared.node.policies() != before
    inode = epsilon.netns.stat().st_ino
    shared.stop(epsilon)
    wait_until(lambda: shared.node.policies() == before, "nothing to be left")
    wait_until(lambda: not _is_open(shared.ztunnels[0].pid, inode), "ztunnel to let go of the namespace")


def test_an_annotation_that_cannot_be_honoured_fails_the_add_in_words(shared: Bed) -> None:
    before = shared.node.policies()
    with pytest.raises(CniFailed, match=r"istio\.io/reroute-virtual-interfaces"):
        shared.pod("tap", AMBIENT, annotations={"istio.io/reroute-virtual-interfaces": "tap0"})
    shared.node.pods["tap"].stop()
    assert shared.node.policies() == before


def test_without_a_ztunnel_an_add_fails_and_leaves_nothing_and_a_running_pod_is_closed(own: Bed) -> None:
    before = own.node.policies()
    with pytest.raises(CniFailed, match="not in the mesh yet: no ztunnel is connected"):
        own.pod("alpha", AMBIENT)
    failed = own.node.pods["alpha"]
    own.wait_redirection(failed, "pending")
    assert own.node.policies() == before
    failed.stop()
    beta, plain = own.pod("beta"), own.pod("plain")
    own.relabel(beta, AMBIENT)
    own.wait_redirection(beta, "pending")
    assert own.way(plain, beta) == own.way(beta, plain) == ["Connection refused"]
    own.ztunnel()
    own.wait_redirection(beta, "enabled")
    assert own.way(plain, beta) == ["ztunnel-inbound", "app"]
    assert own.way(beta, plain) == ["ztunnel-outbound", "app"]
    assert own.way(own.pod("gamma", AMBIENT), beta) == THROUGH


def test_a_ztunnel_that_hangs_fails_an_add_in_words_before_the_plugin_gives_up(own: Bed) -> None:
    ztunnel = own.ztunnel()
    before, alpha = own.node.policies(), own.pod("alpha", AMBIENT)
    with_alpha = own.node.policies()
    ztunnel.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(CniFailed, match="ztunnel has not answered within 5 s"):
            own.pod("beta", AMBIENT)
        plain = own.pod("plain")
        assert own.node.policies() == with_alpha != before
    finally:
        ztunnel.send_signal(signal.SIGCONT)
    own.node.pods["beta"].stop()
    assert own.way(plain, alpha) == ["ztunnel-inbound", "app"]
    assert own.way(own.pod("gamma", AMBIENT), alpha) == THROUGH


def test_pods_outlive_agents_and_ztunnels_that_come_and_go(own: Bed) -> None:
    first = own.ztunnel()
    alpha, beta = own.pod("alpha", AMBIENT), own.pod("beta", AMBIENT)
    for end in (own.node.agent.kill, own.node.agent.terminate):
        end()
        assert own.way(alpha, beta) == THROUGH, "without an agent"
        synced = own.logged("ztunnel.synced")
        own.node.agent.start()
        own.wait_synced(synced)
        assert own.way(alpha, beta) == THROUGH
    own.ztunnel()
    assert own.way(alpha, beta) == THROUGH, "two of them"
    first.kill()
    first.wait()
    assert own.way(alpha, beta) == THROUGH, "the newer one alone"
    gamma = own.pod("gamma", AMBIENT)
    assert own.way(gamma, beta) == THROUGH
    assert own.redirection(alpha) == own.redirection(gamma) == "enabled"


def test_a_reboot_that_annotations_outlive_leaves_no_pod_out(own: Bed) -> None:
    ztunnel = own.ztunnel()
    alpha, beta = own.pod("alpha", AMBIENT), own.pod("beta", AMBIENT)
    own.node.agent.kill()
    ztunnel.kill()
    ztunnel.wait()
    subprocess.run(["umount", "--lazy", own.node.bpffs], check=True)  # programs, links and maps go with it
    subprocess.run(["mount", "-t", "bpf", "bpf", own.node.bpffs], check=True)
    wait_until(lambda: own.way(alpha, beta) == ["app"], "nothing to be captured any more")
    assert own.redirection(alpha) == own.redirection(beta) == "enabled"
    own.node.agent.start()
    own.ztunnel()
    wait_until(lambda: own.way(alpha, beta) == THROUGH, "both to be in the mesh again", 30)


def _is_open(pid: int, inode: int) -> bool:
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if str(each.readlink()) == f"net:[{inode}]":
                return True
    return False


def test_labels_that_flip_again_and_again_cost_the_agent_no_descriptors_and_leave_no_entries(shared: Bed) -> None:
    pods = [shared.pod("eta"), shared.pod("theta")]
    try:
        for pod in pods:  # what is kept from the first time on: connections to the API server
            shared.relabel(pod, AMBIENT)
            shared.wait_redirection(pod, "enabled")
            shared.relabel(pod, {})
            shared.wait_redirection(pod, None)
        entries, descriptors = shared.node.policies(), Path(f"/proc/{shared.node.agent.pid}/fd")
        wait_until(lambda: shared.node.policies() == entries, "the maps to be at rest")
        before = len(list(descriptors.iterdir()))
        for _ in range(20):
            for labels in (AMBIENT, {}):
                for pod in pods:
                    shared.relabel(pod, labels)
        # the agent may be some flips behind
        wait_until(
            lambda: shared.node.policies() == entries and shared.way(pods[0], pods[1]) == ["app"], "both out", 30
        )
        wait_until(lambda: len(list(descriptors.iterdir())) == before, "the descriptors to be closed")
        for pod in pods:
            shared.wait_redirection(pod, None)
    finally:
        shared.stop(*pods)


def test_pods_shows_the_policy_in_the_words_of_ambient_mode_and_what_has_changed(shared: Bed) -> None:
    zeta = shared.pod("zeta", AMBIENT, annotations={"ambient.istio.io/dns-capture": "false"})
    try:
        found = _shown(shared)
        assert found["policy"]["annotations"] == {
            "ambient.istio.io/dns-capture": "false",
            "ambient.istio.io/bypass-inbound-capture": "false",
        }
        assert found["policy"]["proxy"] == {} and found["differs"]["reason"] == ""
        zeta.annotations["ambient.istio.io/dns-capture"] = "true"
        shared.relabel(zeta, AMBIENT)
        (change,) = _shown(shared)["differs"]["changes"]
        assert (change["enrolled"], change["now"]) == ("false", "true")
    finally:
        shared.stop(zeta)


def _shown(shared: Bed) -> dict[str, Any]:
    node = shared.node
    source = ["--kubeconfig", node.directory / "kubeconfig", "--kubernetes-node-name", NODE_NAME]
    argv = ["pods", "zeta", "--bpffs", node.bpffs, "--cni-agent-run-dir", node.run_dir, *source, "--output", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "installer", *map(str, argv)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
