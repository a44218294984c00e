"""The one netlink socket that hears of all pods, and the way back to a namespace that nobody holds."""

import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cni.namespaces import find
from cni.sandbox import own_cookie, visit
from cni.watch import Changes, Watch
from tests.datapath.conftest import ip_command


class Pods:
    """Empty namespaces, by number."""

    def __init__(self) -> None:
        self.tag = secrets.token_hex(3)
        self.made: set[str] = set()

    def make(self, number: int = 0) -> str:
        name = f"sidestep-{self.tag}-{number}"
        ip_command("netns", "add", name)
        self.made.add(name)
        return name

    def delete(self, name: str) -> None:
        ip_command("netns", "del", name)
        self.made.discard(name)


@pytest.fixture
def pods() -> Iterator[Pods]:
    pods = Pods()
    yield pods
    for name in list(pods.made):
        pods.delete(name)


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch()
    yield watch
    watch.close()


def follow(watch: Watch, name: str, cookie: int) -> None:
    with Path("/run/netns", name).open() as netns:
        watch.add(cookie, netns.fileno())


def heard(watch: Watch, seconds: float = 1.0) -> Changes:
    """Everything that happens until nothing does."""
    changed: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()
    while (changes := watch.wait(seconds)) != Changes():
        changed, gone, seconds = changed | changes.changed, gone | changes.gone, 0.2
    return Changes(changed, gone)


CHANGES = {
    "an address": [["addr", "add", "192.0.2.1/24", "dev", "lo"], ["addr", "del", "192.0.2.1/24", "dev", "lo"]],
    "an IPv6 address": [
        ["addr", "add", "2001:db8::1/128", "dev", "lo"],
        ["addr", "del", "2001:db8::1/128", "dev", "lo"],
    ],
    "an interface": [["link", "add", "net1", "type", "bridge"], ["link", "set", "net1", "name", "net2"]],
    "a route": [["route", "add", "198.51.100.0/24", "dev", "lo"], ["route", "del", "198.51.100.0/24"]],
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_heard_for_the_pod_it_happened_in(pods: Pods, watch: Watch, what: str) -> None:
    names = pods.make(1), pods.make(2)
    for cookie, name in enumerate(names):
        ip_command("-n", name, "link", "set", "lo", "up")
        follow(watch, name, cookie)
    assert heard(watch, 0) == Changes()
    for command in CHANGES[what]:
        ip_command("-n", names[1], *command)
        assert heard(watch) == Changes(frozenset({1}))


def test_a_pod_that_is_watched_no_more_is_not_heard(pods: Pods, watch: Watch) -> None:
    name = pods.make()
    follow(watch, name, 1)
    follow(watch, name, 1)
    watch.remove(1)
    ip_command("-n", name, "link", "set", "lo", "up")
    assert heard(watch, 0.2) == Changes()


def test_a_watched_namespace_can_go_and_is_reported_gone(pods: Pods, watch: Watch) -> None:
    name = pods.make()
    follow(watch, name, 7)
    pods.delete(name)
    assert heard(watch, 5).gone == frozenset({7})


def test_what_other_namespaces_say_of_their_neighbours_is_not_believed(pods: Pods, watch: Watch) -> None:
    """Each namespace numbers its neighbours for itself: number 0 of another one is not our number 0."""
    outer, inner, ours = pods.make(1), pods.make(2), pods.make(3)
    for cookie, name in ((1, outer), (3, ours)):
        follow(watch, name, cookie)
    with ExitStack() as inside:
        other = inside.enter_context(Path("/run/netns", outer).open())
        third = inside.enter_context(Path("/run/netns", inner).open())
        visit(other.fileno(), lambda rtnl: rtnl.nsid_of(third.fileno()))
    pods.delete(inner)
    time.sleep(0.5)
    assert heard(watch, 0.5).gone == frozenset()
    ip_command("-n", ours, "link", "set", "lo", "up")
    assert heard(watch) == Changes(frozenset({3}))


def test_lost_events_mean_that_everything_may_have_changed(pods: Pods) -> None:
    watch = Watch(receive_buffer=4096)
    try:
        names = pods.make(1), pods.make(2)
        for cookie, name in enumerate(names):
            follow(watch, name, cookie)
        batch = "".join(f"addr add 192.0.2.{number}/32 dev lo\n" for number in range(1, 200))
        subprocess.run(["ip", "-n", names[0], "-batch", "-"], input=batch, text=True, check=True)
        assert heard(watch).changed == frozenset({0, 1})
    finally:
        watch.close()


def test_a_wait_can_be_ended(watch: Watch) -> None:
    watch.wake()
    assert watch.wait(None) == Changes()


def test_a_second_watch_hears_what_the_first_has_numbered(pods: Pods) -> None:
    name = pods.make()
    for _ in range(2):
        watch = Watch()
        follow(watch, name, 5)
        ip_command("-n", name, "link", "set", "lo", "up")
        ip_command("-n", name, "link", "set", "lo", "down")
        assert heard(watch).changed == frozenset({5})
        watch.close()


def test_namespaces_are_found_again_by_their_cookies(pods: Pods) -> None:
    names = [pods.make(number) for number in range(3)]
    cookies = []
    for name in names:
        with Path("/run/netns", name).open() as netns:
            cookies.append(visit(netns.fileno(), lambda _: own_cookie()))
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = {cookie: os.fstat(netns).st_ino for cookie, netns in find([*cookies[:2], 1])}
    assert found == {cookies[number]: Path("/run/netns", names[number]).stat().st_ino for number in (0, 1)}
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_namespace_without_a_mount_is_found_by_its_processes(pods: Pods) -> None:
    argv = ["unshare", "--net", "sh", "-c", "echo ready; exec cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with Path(f"/proc/{process.pid}/ns/net").open() as netns:
            cookie = visit(netns.fileno(), lambda _: own_cookie())
        assert [found for found, _ in find([cookie])] == [cookie]
        process.kill()
