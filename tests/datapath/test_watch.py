"""Changes in pods' namespaces are noticed from outside, soon and by the right name; watching keeps nothing alive."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bpf import links
from cni.netns.namespaces import find_netns
from cni.netns.sandbox import own_cookie, visit
from cni.netns.watch import Changes, Watch
from cni.netns.watch_each import WatchEach
from tests.datapath.bare import MakePods, Pod, bare_pods, ip_batch, open_descriptors
from tests.datapath.wires import Wire, ip_command
from tests.lab.namespaces import open_netns

SOON = 1.0  # seconds in which a change must have been noticed
QUIET = 0.3  # seconds in which nothing must be
ROOT = Path(__file__).parents[2]
SIOCGSKNS = 0x894C  # uapi/linux/sockios.h: the namespace of a socket

# adds and removes an address on lo N times as fast as it can, then leaves another one, all through one socket
CHURN = """
import socket, struct, sys
from ipaddress import ip_address
def address(kind, ip, flags):
    raw = ip_address(ip).packed
    body = struct.pack("=BBBBi", socket.AF_INET, 32, 0, 0, 1) + struct.pack("=HH", 8, 2) + raw
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body
rtnl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
for _ in range(int(sys.argv[1])):
    rtnl.send(address(20, "10.1.1.1", 0x601))
    rtnl.send(address(21, "10.1.1.1", 1))
rtnl.send(address(20, "10.1.1.2", 0x601))
"""

# a route from a socket with the given port, with NLM_F_ECHO
ECHO = """
import socket, struct, sys
rtnl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
rtnl.bind((int(sys.argv[1]), 0))
body = struct.pack("=8BI", socket.AF_INET, 32, 0, 0, 254, 4, 253, 1, 0)  # main table, static, scope link, unicast
body += struct.pack("=HH4B", 8, 1, 10, 2, 2, 2) + struct.pack("=HHI", 8, 4, 1)  # RTA_DST, RTA_OIF lo
rtnl.send(struct.pack("=IHHII", 16 + len(body), 24, 0x601 | 8, 1, 0) + body)
"""


@pytest.fixture
def make_pods() -> Iterator[MakePods]:
    with bare_pods() as make:
        yield make


@contextmanager
def watching(*pods: Pod, kind: type[Watch] | type[WatchEach] = Watch, **options: int) -> Iterator[Any]:
    with closing(kind(**options)) as watch:
        for pod in pods:
            add(watch, pod)
        yield watch


def add(watch: Any, pod: Pod) -> None:
    with pod.path.open() as netns:
        watch.add(pod.cookie, netns.fileno())


def collect(watch: Any, done: Callable[[Changes], bool], seconds: float = SOON) -> Changes:
    """Everything reported until `done` says that it is enough, or time is up."""
    seen = Changes()
    deadline = time.monotonic() + seconds
    while not done(seen) and (left := deadline - time.monotonic()) > 0:
        more = watch.wait(left)
        seen = Changes(seen.changed | more.changed, seen.gone | more.gone)
    return seen


def changed(watch: Any) -> set[int]:
    return set(watch.wait(SOON).changed)


def settle(watch: Any) -> None:
    """Let what belongs to the last change arrive: duplicate address detection, routes, carriers."""
    while watch.wait(QUIET):
        pass


BOTH = pytest.mark.parametrize("kind", [Watch, WatchEach])


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        "addr add 10.9.0.3/24 dev first",
        "addr del 10.9.0.2/24 dev first",
        "addr add fd99::3/64 dev first",
        "addr del fd99::2/64 dev first",
        "link add third type veth peer fourth",
        "link set second down",
        "link set third name renamed",
        "link set third netns {other}",
        "link del first",
        "route add 10.77.0.0/16 via 10.9.0.1",
        "route del 10.78.0.0/16",
        "route add fd77::/32 via fd99::1",
        "route del fd78::/32",
    ],
)
def test_a_change_is_noticed(make_pods: MakePods, change: str, kind: type[Any]) -> None:
    pod, other = make_pods(2)
    pod.ip("link add first type veth peer second")
    if "name" in change or "netns" in change:
        pod.ip("link add third type veth peer fourth")
    for command in (
        "link set first up",
        "link set second up",
        "addr add 10.9.0.2/24 dev first",
        "addr add fd99::2/64 dev first nodad",
        "route add 10.78.0.0/16 via 10.9.0.1",
        "route add fd78::/32 via fd99::1",
    ):
        pod.ip(command)
    with watching(pod, kind=kind) as watch:
        settle(watch)
        pod.ip(change.format(other=other.name))
        assert changed(watch) == {pod.cookie}


@BOTH
def test_pods_are_told_apart(make_pods: MakePods, kind: type[Any]) -> None:
    one, two, unwatched = make_pods(3)
    with watching(one, two, kind=kind) as watch:
        settle(watch)
        for pod, expected in ((one, {one.cookie}), (two, {two.cookie}), (unwatched, set())):
            pod.ip("addr add 10.9.0.3/24 dev lo")
            assert watch.wait(SOON if expected else QUIET).changed == expected
        one.ip("addr del 10.9.0.3/24 dev lo")
        two.ip("addr del 10.9.0.3/24 dev lo")
        both = {one.cookie, two.cookie}
        assert collect(watch, lambda seen: seen.changed == both).changed == both


@BOTH
def test_what_cannot_matter_is_not_reported(make_pods: MakePods, kind: type[Any]) -> None:
    (pod,) = make_pods(1)
    for command in ("link add bridge type bridge", "link add port type veth peer far", "link set port master bridge"):
        pod.ip(command)
    with watching(pod, kind=kind) as watch:
        settle(watch)
        pod.ip("link set lo promisc on")  # tcpdump
        pod.ip("neigh add 10.9.0.9 lladdr 02:00:00:00:00:01 dev port")
        pod.ip("link set dev port type bridge_slave hairpin on")
        assert not watch.wait(QUIET)


@BOTH
def test_a_burst_comes_together_and_its_end_is_seen(make_pods: MakePods, kind: type[Any]) -> None:
    (pod,) = make_pods(1)
    with watching(pod, kind=kind) as watch:
        settle(watch)
        churn = threading.Thread(target=pod.python, args=(CHURN, 500))
        churn.start()
        answers, last = 0, False
        while not last:
            assert watch.wait(10).changed == {pod.cookie}
            answers += 1
            time.sleep(0.01)  # what a look at the pod takes
            shown = subprocess.run(["ip", "-n", pod.name, "-o", "addr"], capture_output=True, text=True, check=True)
            last = "10.1.1.2/" in shown.stdout
        churn.join()
        assert answers < 100


def test_a_burst_that_nobody_waits_for_is_one_answer(make_pods: MakePods) -> None:
    pod, other = make_pods(2)
    with watching(pod, other) as watch:
        settle(watch)
        pod.python(CHURN, 500)
        assert watch.wait(SOON) == Changes(frozenset({pod.cookie}))
        assert not watch.wait(QUIET)


def test_dropped_messages_report_every_pod_and_who_is_gone(make_pods: MakePods) -> None:
    pod, quiet, dies = make_pods(3)
    with watching(pod, quiet, dies, room=8192) as watch, watching(dies) as witness:
        settle(watch)
        pod.python(CHURN, 500)
        ip_command("netns", "del", dies.name)
        assert collect(witness, lambda seen: bool(seen.gone), 5).gone
        assert watch.wait(SOON) == Changes(frozenset({pod.cookie, quiet.cookie}), frozenset({dies.cookie}))
        assert not watch.wait(QUIET)
        quiet.ip("addr add 10.9.0.3/24 dev lo")  # it hears again
        assert changed(watch) == {quiet.cookie}


def test_a_deleted_namespace_is_reported_once_as_gone(make_pods: MakePods) -> None:
    dies, stays = make_pods(2)
    with watching(dies, stays) as watch:
        settle(watch)
        ip_command("netns", "del", dies.name)
        assert collect(watch, lambda seen: bool(seen.gone), 5) == Changes(gone=frozenset({dies.cookie}))
        assert not watch.wait(QUIET)
        watch.remove(dies.cookie)  # harmless
        stays.ip("addr add 10.9.0.3/24 dev lo")
        assert changed(watch) == {stays.cookie}


def test_a_gone_namespace_is_not_mistaken_for_its_successor(make_pods: MakePods) -> None:
    with watching() as watch:
        for _ in range(10):
            (pod,) = make_pods(1)
            add(watch, pod)
            ip_command("netns", "del", pod.name)
            (successor,) = make_pods(1)
            add(watch, successor)
            seen = collect(watch, lambda seen: bool(seen.gone), 5)
            assert seen.gone == {pod.cookie}
            ip_command("netns", "del", successor.name)
            assert collect(watch, lambda seen: bool(seen.gone), 5).gone == {successor.cookie}


def test_watching_and_finding_keep_no_namespace_alive(wire: Wire) -> None:
    wire.enrol()
    pod = Pod(wire.pod.path.name, wire.sandbox.cookie)
    pins = wire.kernel.pins
    with watching(pod) as watch:
        with find_netns({pod.cookie}) as found:
            assert [cookie for cookie, _ in found] == [pod.cookie]
        assert links.pod_link_alive(pins, pod.cookie)
        ip_command("netns", "del", pod.name)
        ip_command("netns", "add", pod.name)  # the fixture wants one to take down
        assert collect(watch, lambda seen: bool(seen.gone), 5).gone == {pod.cookie}
        deadline = time.monotonic() + 5
        while links.pod_link_alive(pins, pod.cookie) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not links.pod_link_alive(pins, pod.cookie)


def test_a_second_watch_works_beside_and_after_the_first(make_pods: MakePods) -> None:
    (pod,) = make_pods(1)
    with watching(pod) as first, watching(pod) as second:
        for watch in (first, second):
            settle(watch)
        pod.ip("addr add 10.9.0.3/24 dev lo")
        assert changed(first) == changed(second) == {pod.cookie}
    with watching(pod) as again:
        pod.ip("addr del 10.9.0.3/24 dev lo")
        assert changed(again) == {pod.cookie}


def test_adding_twice_and_after_removing_is_fine(make_pods: MakePods) -> None:
    pod, other = make_pods(2)
    with watching(pod, pod) as watch:
        settle(watch)
        watch.remove(pod.cookie)
        watch.remove(pod.cookie)
        pod.ip("addr add 10.9.0.3/24 dev lo")
        assert not watch.wait(QUIET)
        add(watch, pod)
        add(watch, other)
        pod.ip("addr del 10.9.0.3/24 dev lo")
        assert changed(watch) == {pod.cookie}
        other.ip("addr add 10.9.0.3/24 dev lo")
        assert changed(watch) == {other.cookie}


def test_a_descriptor_that_is_no_namespace_is_an_error_and_changes_nothing(make_pods: MakePods) -> None:
    (pod,) = make_pods(1)
    with watching() as watch:
        with Path("/dev/null").open() as null, pytest.raises(OSError, match="Invalid argument"):
            watch.add(1, null.fileno())
        add(watch, pod)
        pod.ip("addr add 10.9.0.3/24 dev lo")
        assert changed(watch) == {pod.cookie}


def test_wake_ends_a_wait_from_another_thread(make_pods: MakePods) -> None:
    with watching() as watch:
        waker = threading.Timer(0.1, watch.wake)
        waker.start()
        started = time.monotonic()
        assert not watch.wait(60)
        assert time.monotonic() - started < 60  # it was woken, rather than that the time was up
        waker.join()
        watch.wake()
        assert not watch.wait()  # at once: somebody wanted us before we waited
        assert not watch.wait(0)


def test_a_change_made_with_the_watchs_process_id_as_port_is_noticed(make_pods: MakePods) -> None:
    """With NLM_F_ECHO the kernel leaves out sockets that have the maker's port, a process id in its own pod."""
    (pod,) = make_pods(1)
    with watching(pod) as watch:
        settle(watch)
        pod.python(ECHO, os.getpid())
        assert changed(watch) == {pod.cookie}


def test_pods_come_and_go_while_somebody_waits(make_pods: MakePods) -> None:
    pods = make_pods(20)
    seen: set[int] = set()
    with watching() as watch:

        def wait() -> None:
            while seen != {pod.cookie for pod in pods} and (more := watch.wait(5)):
                seen.update(more.changed)

        waiter = threading.Thread(target=wait)
        waiter.start()
        for pod in pods:
            add(watch, pod)
            pod.ip("addr add 10.9.0.3/24 dev lo")
        waiter.join()
    assert seen == {pod.cookie for pod in pods}


def test_hundreds_of_pods(make_pods: MakePods) -> None:
    pods = make_pods(200)
    cookies = {pod.cookie for pod in pods}
    with watching(*pods) as watch:
        settle(watch)
        for pod in (pods[0], pods[99], pods[199]):
            pod.ip("addr add 10.9.0.3/24 dev lo")
            assert changed(watch) == {pod.cookie}
            settle(watch)
        with find_netns(cookies) as found:
            assert {cookie for cookie, _ in found} == cookies
        ip_batch([f"netns del {pod.name}" for pod in pods])
        assert collect(watch, lambda seen: seen.gone == cookies, 20) == Changes(gone=frozenset(cookies))


def test_sockets_and_namespace_of_a_watch_end_with_it() -> None:
    before = open_descriptors()
    with watching() as witness:
        watch = Watch()
        own = fcntl.ioctl(watch._socket, SIOCGSKNS)
        witness.add(1, own)
        os.close(own)
        watch.close()
        assert collect(witness, lambda seen: bool(seen.gone), 5).gone == {1}
    assert open_descriptors() == before


def test_without_the_right_to_listen_the_error_says_which_it_takes() -> None:
    rights = ["setpriv", "--bounding-set", "-net_broadcast", "--inh-caps", "-net_broadcast"]
    made = subprocess.run(
        [*rights, sys.executable, "-c", "from cni.netns.watch import Watch; Watch()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "Operation not permitted; run as root with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_BROADCAST" in made.stderr


def test_a_pod_with_users_of_its_own_is_found_and_heard() -> None:
    with ExitStack() as undo, watching() as watch:
        inside = [
            "unshare",
            "--user",
            "--map-root-user",
            "--net",
            "sh",
            "-c",
            "echo; read _; ip link set lo up; read _",
        ]
        pod = undo.enter_context(
            subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        )
        assert pod.stdin is not None and pod.stdout is not None
        undo.callback(pod.kill)
        assert pod.stdout.readline() == "\n"
        with Path(f"/proc/{pod.pid}/ns/net").open() as netns:
            cookie = visit(netns.fileno(), lambda _: own_cookie())
        with open_netns(cookie) as fd:
            assert fd is not None
            watch.add(cookie, fd)
        pod.stdin.write("\n")
        assert changed(watch) == {cookie}


def test_one_socket_in_each_needs_no_right_to_hear_other_namespaces(make_pods: MakePods) -> None:
    (pod,) = make_pods(1)
    code = (
        "import sys; from cni.netns.watch_each import WatchEach; watch = WatchEach(); "
        "file = open(sys.argv[1]); watch.add(1, file.fileno()); print(flush=True); "
        "print(sorted(watch.wait(20).changed))"
    )
    rights = ["setpriv", "--bounding-set", "-net_broadcast", "--inh-caps", "-net_broadcast"]
    argv = [*rights, sys.executable, "-c", code, str(pod.path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as made:
        assert made.stdout is not None
        assert made.stdout.readline() == "\n"
        pod.ip("addr add 10.9.0.3/24 dev lo")
        assert made.stdout.read() == "[1]\n"


def test_a_namespace_that_only_our_socket_keeps_alive_is_let_go_of(make_pods: MakePods) -> None:
    kept, deleted = make_pods(2)
    with watching() as witness, watching(kept, deleted, kind=WatchEach) as watch:
        add(witness, deleted)
        watch.let_go_of_unused(Path("/proc"))
        subprocess.run(["ip", "netns", "del", deleted.name], check=True)
        assert not collect(witness, lambda seen: bool(seen.gone), QUIET).gone
        watch.let_go_of_unused(Path("/proc"))
        assert collect(witness, lambda seen: bool(seen.gone), 5).gone == {deleted.cookie}
        kept.ip("addr add 10.9.0.3/24 dev lo")
        assert changed(watch) == {kept.cookie}


def test_messages_that_did_not_fit_count_as_a_change(make_pods: MakePods) -> None:
    (pod,) = make_pods(1)
    with watching(pod, kind=WatchEach, room=4096) as watch:
        settle(watch)
        pod.python(CHURN, 500)
        assert changed(watch) == {pod.cookie}
        settle(watch)
        pod.ip("addr add 10.9.0.3/24 dev lo")
        assert changed(watch) == {pod.cookie}
