"""Sixteen faults of docs/troubleshooting.md in a running node: the command of the page names each in the page's words.

One test a fault. `make faults` runs them and counts.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from bpf import syscalls
from bpf.layout import Cookie, Word
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from bpf.tables import Tables
from tests.lab.apiserver import ApiServer
from tests.lab.chain import CniFailed
from tests.lab.invocation import REPOSITORY, sidestep
from tests.lab.node import NODE_NAME, Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.test_left_out import with_istios_rules
from tests.node.test_readiness import missing
from tests.node.test_status import options
from tests.node.test_strays import stray
from tests.node.test_unsteered import unsteer
from tests.node.test_walk import LISTEN, running

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
COUNT = 16
_ROW = re.compile(r"\| (?P<fault>[^|`]+) \| `sidestep (?P<command>[^`]+)` \| `(?P<words>[^`]+)` \|")


class Fault(NamedTuple):
    """A row of the page."""

    fault: str
    command: str
    words: str


def rows() -> list[Fault]:
    section = PAGE.read_text().partition("## Sixteen faults")[2].partition("\n## ")[0]
    return [Fault(*found.groups()) for line in section.splitlines() if (found := _ROW.fullmatch(line))]


class Bed:
    """A node with an agent that installs, two mesh pods, and what the commands must be told about it."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node, self.net = node, directory / "net.d"
        binaries = directory / "bin"
        for each in (self.net, binaries):
            each.mkdir()
        self.conf = self.net / "10-a.conflist"
        self.conf.write_text('{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}')
        self.where: list[str | Path] = ["--install", "--shim", node.shim]
        self.where += ["--mounted-cni-bin-dir", binaries, "--mounted-cni-net-dir", self.net]

    def says(self, command: str) -> str:
        """What a command says, wherever it says it, when it is typed as on the page."""
        name, *rest = command.split()
        known = options(self.node)[:6] if name != "status" else (*options(self.node), *self.where)
        done = sidestep(name, *known, *rest)
        assert done.returncode in (0, 1, 3), done.stderr
        return done.stdout + done.stderr

    def pod(self, name: str) -> Pod:
        return self.node.pods[name]

    def is_ready(self) -> bool:
        return missing(self.node) == {}


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    node = Node()
    made = Bed(node, tmp_path_factory.mktemp("host"))
    node.agent.options += made.where
    with node:
        node.pod("alpha")
        node.pod("beta", annotations={"sidestep.io/deny-inbound-ports": "23"})
        wait_until(made.is_ready, "the agent to be ready", 30)
        assert made.says("status").startswith("OK: 2 pods are captured, nothing is wrong\n")
        yield made


@contextmanager
def no_agent(bed: Bed) -> Iterator[None]:
    bed.node.agent.kill()
    try:
        yield
    finally:
        bed.node.agent.start()
        wait_until(bed.is_ready, "the agent to be ready", 30)


@contextmanager
def hanging_agent(bed: Bed) -> Iterator[None]:
    os.kill(bed.node.agent.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(bed.node.agent.pid, signal.SIGCONT)


@contextmanager
def no_entry(bed: Bed) -> Iterator[None]:
    """Somebody rewrites the chain, and the agent can't put the entry back."""
    before = bed.conf.read_text()
    with hanging_agent(bed):
        bed.conf.write_text('{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}')
        subprocess.run(["mount", "--bind", bed.net, bed.net], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", bed.net], check=True)
    try:
        wait_until(lambda: "installed" in missing(bed.node), "the agent to notice", 30)
        yield
    finally:
        subprocess.run(["umount", bed.net], check=True)
        bed.conf.write_text(before)
        wait_until(bed.is_ready, "the agent to be ready", 30)


@contextmanager
def detached_program(bed: Bed) -> Iterator[None]:
    with no_agent(bed):
        path = Pins(bed.node.bpffs).links / "connect4"
        with Descriptor(syscalls.open_pin(path)) as link:
            syscalls.detach_link(link.fd, path)
        yield


@contextmanager
def detached_steering(bed: Bed) -> Iterator[None]:
    with no_agent(bed):
        unsteer(bed.node, bed.pod("alpha"))
        yield


@contextmanager
def full_map(bed: Bed) -> Iterator[None]:
    added = [Cookie((1 << 63) + number) for number in range(3600)]
    with Tables(Pins(bed.node.bpffs)) as tables:
        for each in added:
            tables.started.put(each, Word(1))
        try:
            yield
        finally:
            for each in added:
                tables.started.remove(each)


@contextmanager
def stopped_at_the_end(pod: Pod) -> Iterator[Pod]:
    try:
        yield pod
    finally:
        pod.stop()


@contextmanager
def rules_of_istio(bed: Bed) -> Iterator[None]:
    with stopped_at_the_end(bed.node.pod("twice")) as pod:
        with_istios_rules(pod)
        yield


@contextmanager
def no_proxy(bed: Bed) -> Iterator[None]:
    bed.pod("alpha").envoy.stop()
    try:
        yield
    finally:
        bed.pod("alpha").envoy.start()


@contextmanager
def proxy_of_another_user(bed: Bed) -> Iterator[None]:
    with no_proxy(bed), running(bed.pod("alpha"), LISTEN, "0.0.0.0", 15006):
        yield


@contextmanager
def stray_process(bed: Bed) -> Iterator[None]:
    outside = bed.node.cgroup / "outside"
    outside.mkdir()
    with stray(bed.pod("alpha"), outside):
        yield


@contextmanager
def misspelt(bed: Bed) -> Iterator[None]:
    wrong = {"traffic.sidecar.istio.io/includeOutboundIPRange": "10.0.0.0/8"}
    with stopped_at_the_end(bed.node.pod("odd", annotations=wrong)):
        yield


@contextmanager
def refused(bed: Bed) -> Iterator[None]:
    wrong = {"traffic.sidecar.istio.io/excludeOutboundPorts": "80-90"}
    with stopped_at_the_end(Pod(bed.node, "wrong", annotations=wrong, app=False, envoy=False)) as pod:
        with pytest.raises(CniFailed):
            pod.create()
        yield


@contextmanager
def nothing(_: Bed) -> Iterator[None]:
    """The fault is in the pods as they are: nobody listens on 7777, and beta denies 23."""
    yield


@contextmanager
def no_route(bed: Bed) -> Iterator[None]:
    netns = bed.pod("alpha").netns.name
    gone = subprocess.run(["ip", "-n", netns, "route", "show", "default"], capture_output=True, text=True, check=True)
    subprocess.run(["ip", "-n", netns, "route", "del", "default"], check=True)
    try:
        wait_until(lambda: "no-route" in bed.says("explain alpha 198.51.100.1:80"), "the agent to follow")
        yield
    finally:
        subprocess.run(["ip", "-n", netns, "route", "add", *gone.stdout.split()], check=True)


FAULTS: dict[str, Callable[[Bed], AbstractContextManager[None]]] = {
    "the agent is gone": no_agent,
    "the agent hangs": hanging_agent,
    "the plugin's entry in the chain is gone": no_entry,
    "a program is detached": detached_program,
    "a pod's inbound steering is detached": detached_steering,
    "a map is nearly full": full_map,
    "istio-cni has set up an enrolled pod as well": rules_of_istio,
    "the proxy has ended": no_proxy,
    "the proxy runs as another user": proxy_of_another_user,
    "a process is outside of the pod's cgroups": stray_process,
    "an annotation is misspelt": misspelt,
    "an annotation's value is wrong, so the pod is refused": refused,
    "the application does not listen": nothing,
    "the server denies the port": nothing,
    "the client has no route": no_route,
}
OF_API_SERVER = "the API server is away"


def test_the_page_has_all_of_them_and_no_other() -> None:
    assert {each.fault for each in rows()} == {*FAULTS, OF_API_SERVER}
    assert len(rows()) == COUNT
    assert {each.command.split()[0] for each in rows()} == {"status", "pods", "explain"}


@pytest.mark.parametrize("row", [each for each in rows() if each.fault in FAULTS], ids=lambda row: row.fault)
def test_a_fault_is_named_in_words(bed: Bed, row: Fault) -> None:
    if FAULTS[row.fault] is not nothing:
        assert row.words not in bed.says(row.command)
    with FAULTS[row.fault](bed):
        said = bed.says(row.command)
        assert row.words in said, said
        if row.command == "status":
            is_alone = FAULTS[row.fault] not in (detached_program, detached_steering)  # which need the agent away
            assert said.startswith("WRONG: one thing\n" if is_alone else "WRONG: 2 things\n"), said
            assert said.count("  → ") == 1, said  # one remedy for one fault
            assert re.search(rf"^✗ .*{re.escape(row.words)}.*\n(✗ .*\n)*  → .", said, re.MULTILINE), said


def test_an_api_server_that_is_away_is_named_in_words(tmp_path: Path) -> None:
    (row,) = [each for each in rows() if each.fault == OF_API_SERVER]
    with ExitStack() as stack:
        api = stack.enter_context(ApiServer().running())
        node = stack.enter_context(Node(api=api))
        node.pod("alpha")
        kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
        known = [*options(node)[:4], "--kubeconfig", kubeconfig, "--kubernetes-node-name", NODE_NAME]
        known += options(node)[6:]
        well = sidestep("status", *known, "--wait", "30")
        assert well.stdout.startswith("OK: ")
        api.stop()
        wait_until(lambda: "synced" in missing(node), "the agent to notice", 30)
        said = sidestep("status", *known)
        assert said.returncode == 1
        assert re.search(rf"^✗ readiness: {re.escape(row.words)}.*Connection refused", said.stdout, re.MULTILINE)
        assert "  → see to the reason that is named: the API server" in said.stdout
