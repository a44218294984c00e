"""Which of a proxy's listening sockets get connections: many workers, both families, a successor."""

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import closing

import pytest

from bpf.iterator import SocketIterator
from bpf.layout import LISTENER_SLOTS, Quad
from cni.netns.sandbox import visit
from cni.policy.annotations import CapturePolicy
from tests.datapath.adopting import LATE, WAYS, Parts, Running, enrol_by_cni, running
from tests.datapath.wires import PROXY, Kernel, Wire
from tests.lab.inside import PYTHON
from tests.lab.userns import FIRST, mapped_netns

WORKERS = [2, 16, 17, 64]


@pytest.fixture
def pod(wire: Wire) -> Iterator[Running]:
    with running(wire) as made:
        yield made


def who_answers(wire: Wire) -> set[str]:
    """In either family, whatever socket of the group the kernel chooses."""
    answers = [wire.peer.dial(ip, 8080) for ip in (wire.pod.ip4, wire.pod.ip6) for _ in range(2)]
    return {each.get("who") or each["error"] for each in answers}


@pytest.mark.parametrize("workers", WORKERS)
def test_a_proxy_with_many_workers_serves_both_families(wire: Wire, workers: int) -> None:
    """Envoy binds the sockets of all workers for one address, then those for the next (additional_addresses)."""
    wire.enrol()
    wire.pod.serve("inbound", f"15006x{workers}", uid=PROXY)
    assert who_answers(wire) == {"inbound"}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("ends", ["old", "new"])
def test_a_proxy_and_its_successor_may_listen_at_once(wire: Wire, workers: int, ends: str) -> None:
    """The old closes its sockets after the new has opened its own, or the new fails and the old goes on."""
    wire.enrol()
    proxies = {name: wire.pod.serve(name, f"15006x{workers}", uid=PROXY) for name in ("old", "new")}
    assert who_answers(wire) <= {"old", "new"}
    wire.pod.end(proxies.pop(ends))
    assert who_answers(wire) == set(proxies)


@pytest.mark.parametrize("ends", ["old", "new"])
def test_a_strict_proxy_and_its_successor_may_listen_at_once(wire: Wire, ends: str) -> None:
    wire.enrol(CapturePolicy(dual_stack=True, strict_proxy=True))
    assert wire.pod.cgroup is not None
    wire.kernel.tables.proxies.put(wire.key, Quad(wire.pod.cgroup.stat().st_ino))
    proxies = {name: wire.pod.serve(name, "15006x17", uid=PROXY) for name in ("old", "new")}
    wire.pod.end(proxies.pop(ends))
    assert who_answers(wire) == set(proxies)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("workers", WORKERS)
def test_the_listeners_of_a_running_proxy_are_found(agent: Parts, pod: Running, workers: int) -> None:
    pod.serve("inbound", f"15006x{workers}")
    outcome = agent.adopt(pod.pod(pod.proxy))
    assert outcome is not None
    assert (outcome.problem, outcome.listeners) == ("", LISTENER_SLOTS)
    assert who_answers(pod.wire) == {"inbound"}


@pytest.mark.parametrize("workers", [1, 17])
def test_after_a_replacement_the_next_one_may_fail(agent: Parts, pod: Running, workers: int) -> None:
    """When the predecessor's sockets close, slots become free, and the agent fills them from the successor's."""
    enrol_by_cni(agent, pod.wire, pod.pod())
    agent.reconciler.look()
    proxies = {name: pod.serve(name, f"15006x{workers}") for name in ("first", "second")}
    agent.reconciler.look()
    container = pod.container(pod.proxy)
    container.end(proxies["first"])
    agent.reconciler.look()
    container.end(pod.serve("third", f"15006x{workers}"))
    assert who_answers(pod.wire) == {"second"}


STRICT = {"sidestep.io/strict-proxy": "true"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("workers", [2, 17])
def test_a_strict_proxy_may_listen_before_its_container_is_known(agent: Parts, pod: Running, workers: int) -> None:
    """A kubelet tells the container's id after it has started the container; the same again for each restart."""
    agent.pods.pods = [pod.pod(**STRICT)]
    enrol_by_cni(agent, pod.wire, agent.pods.pods[0])
    for _ in range(2):
        container = secrets.token_hex(32)
        proxy = pod.container(container).serve("inbound", f"15006x{workers}", uid=PROXY)
        agent.proxies.refresh()
        agent.reconciler.look()
        assert who_answers(pod.wire) == {"Connection refused"}
        agent.pods.pods = [pod.pod(container, **STRICT)]
        agent.proxies.refresh()
        assert agent.reconciler.look() == {"heard": LISTENER_SLOTS}
        assert who_answers(pod.wire) == {"inbound"}
        pod.container(container).end(proxy)


def test_a_strict_proxy_may_bind_before_its_container_is_known_and_listen_afterwards(
    agent: Parts, pod: Running
) -> None:
    agent.pods.pods = [pod.pod(**STRICT)]
    enrol_by_cni(agent, pod.wire, agent.pods.pods[0])
    late = pod.container(pod.proxy).start([*PYTHON, LATE, "4", "15006"], PROXY)
    agent.pods.pods = [pod.pod(pod.proxy, **STRICT)]
    agent.proxies.refresh()
    assert agent.reconciler.look() == {}
    assert late.stdin is not None
    assert late.stdout is not None
    late.stdin.write("go\n")
    late.stdin.flush()
    assert late.stdout.readline() == "listening\n"
    assert pod.wire.peer.dial(pod.wire.pod.ip4, 8080)["who"] == "late"


def test_a_socket_is_its_openers_whoever_it_is_given_to(agent: Parts, pod: Running) -> None:
    """Istio's rules go by the credentials that a socket was opened with, not by its inode's owner."""
    given = """
import os, socket
s = socket.socket()
os.fchown(s.fileno(), 1337, 1337)
s.bind(("0.0.0.0", 15006))
s.listen()
print("ready", flush=True)
s.accept()[0].sendall(b'{"who": "impostor"}\\n')
"""
    pod.container(pod.proxy).start([*PYTHON, given], 0)
    outcome = agent.adopt(pod.pod(pod.proxy))
    assert outcome is not None
    assert (outcome.problem, outcome.listeners) == ("", 0)
    assert pod.wire.peer.dial(pod.wire.pod.ip4, 8080) == {"error": "Connection refused"}


def test_a_kernel_that_takes_the_iterator_and_stores_nothing_is_found_out(
    agent: Parts, pod: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SocketIterator, "store", lambda *_: None)
    pod.serve("inbound", "15006x2")
    outcome = agent.adopt(pod.pod(pod.proxy))
    assert outcome is not None
    assert (outcome.problem, outcome.listeners) == ("", LISTENER_SLOTS)
    assert agent.hearing.needs_processes
    assert who_answers(pod.wire) == {"inbound"}


def test_openers_in_a_user_namespace_are_told_by_their_ids_outside(kernel: Kernel) -> None:
    """As those of a pod with `hostUsers: false`, whose proxy the maps have by these ids."""
    code = 'import socket; s = socket.socket(); s.bind(("", 15006)); s.listen(); print("ready", flush=True); input()'
    with mapped_netns() as netns, closing(SocketIterator(kernel.pins)) as iterator:
        within = [f"--{kind}={netns.with_name(name)}" for kind, name in (("user", "user"), ("net", "net"))]
        argv = ["nsenter", *within, f"--setuid={PROXY}", f"--setgid={PROXY}", *PYTHON, code]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
            assert proxy.stdout is not None
            assert proxy.stdout.readline() == "ready\n"
            with netns.open() as opened:
                (found,) = visit(opened.fileno(), lambda _: iterator.found())
            proxy.kill()
    assert (found.opener.uid, found.opener.gid) == (FIRST + PROXY, FIRST + PROXY)


def test_a_proxy_that_was_bound_while_the_programs_were_detached_is_heard(agent: Parts, pod: Running) -> None:
    agent.pods.pods = [pod.pod(pod.proxy)]
    enrol_by_cni(agent, pod.wire, agent.pods.pods[0])
    for link in agent.kernel.pins.links.iterdir():
        link.unlink()
    late = pod.container(pod.proxy).start([*PYTHON, LATE, "4", "15006"], PROXY)
    assert agent.reconciler.look() == {"restored": 1}
    assert late.stdin is not None
    assert late.stdout is not None
    late.stdin.write("go\n")
    late.stdin.flush()
    assert late.stdout.readline() == "listening\n"
    assert agent.reconciler.look() == {"heard": 1}
    assert pod.wire.peer.dial(pod.wire.pod.ip4, 8080)["who"] == "late"
