"""`make bench-connect`: does connect() cost more the more rules a pod has, or the more pods a node has?

One pod, one resident process in it that connects over and over, and what is around it changes: 1 outbound rule or
10,000 ranges and as many ports; no other pod on the node or 499. For orientation also a process outside of the mesh,
with the programs attached and detached. Captured connections end at a stand-in for the proxy, excluded ones at the
other end of a cable. Both sides of a comparison take turns in every round. Prints ratios of the rounds' medians, no
times: those are the machine's. Beside that, in nanoseconds, what it costs that calls which are not captured are noted
(bpf/uncaptured.c), and how long it takes to enrol a pod with 10,000 ranges.
"""

import ctypes
import os
import secrets
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import click

from bpf.attachment import attach_programs, detach_programs
from bpf.layout import Cookie
from bpf.tables import Tables
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Identity, entries_of
from cni.netns.plumbing import prepare
from cni.netns.sandbox import InterfaceAddress, Sandbox, look, own_cookie, visit
from cni.policy.annotations import EXCLUDE_OUTBOUND_RANGES, CapturePolicy, policy_of
from cni.policy.pod import Pod
from tests.datapath.wires import scratch_pins
from tests.lab.inside import PYTHON, popen
from tests.lab.node import NETNS, make_netns

RULES, PODS = 10_000, 500
APP, PROXY = 1000, 1337
PORTS = {"captured": "15001", "direct": "80", "datagram": "nobody"}  # who answers
_CLONE_NEWNET = 0x40000000

# A line "MODE TARGET COUNT" in; out come the median time of that connect() in ns and the port that answered the last.
# Captured ones go to 10.0.1.0/24, 10.0.3.0/24, …, between the excluded ranges. Closing resets, so that nothing stays in
# TIME_WAIT.
CLIENT = """
import errno, socket, statistics, struct, sys, time
targets = {
    "captured": [(f"10.{n >> 8}.{n & 255}.{n % 254 + 1}", 80) for n in range(1, 20000, 2)],
    "direct": [(f"10.0.0.{n}", 80) for n in range(1, 255)],
    "datagram": [(f"10.0.0.{n}", 443) for n in range(1, 255)],
}
reset, clock = struct.pack("ii", 1, 0), time.perf_counter_ns
print("ready", flush=True)
for line in sys.stdin:
    mode, target, count = line.split()
    spent = []
    if target == "datagram":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            for n in range(int(count)):
                to = targets[target][n * 7919 % len(targets[target])]
                started = clock()
                s.sendto(b"x", to)
                spent.append(clock() - started)
        print(statistics.median(spent), "nobody", flush=True)
        continue
    for n in range(int(count)):
        to = targets[target][n * 7919 % len(targets[target])]
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        if mode == "blocking":
            s.settimeout(None)
            started = clock()
            s.connect(to)
            spent.append(clock() - started)
        else:
            s.setblocking(False)
            started = clock()
            outcome = s.connect_ex(to)
            spent.append(clock() - started)
            assert outcome in (0, errno.EINPROGRESS), errno.errorcode[outcome]
        if n == int(count) - 1:
            s.settimeout(5)
            answered = s.recv(9).decode()
        s.close()
    print(statistics.median(spent), answered, flush=True)
"""
SERVER = """
import contextlib, socket, sys
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("0.0.0.0", int(sys.argv[1])))
listener.listen(4096)
print("ready", flush=True)
while True:
    with contextlib.suppress(OSError), listener.accept()[0] as connection:
        connection.send(sys.argv[1].encode())
"""
FEW = CapturePolicy(exclude_outbound=(ip_network("10.0.0.0/24"),))
MANY = CapturePolicy(
    exclude_outbound=tuple(ip_network(f"10.{n >> 8}.{n & 255}.0/24") for n in range(0, 2 * RULES, 2)),
    exclude_outbound_ports=frozenset(range(20_000, 20_000 + RULES)),
)


@dataclass(frozen=True)
class Client:
    """The process in the pod that is timed."""

    process: "subprocess.Popen[str]"

    def median(self, mode: str, target: str, count: int) -> float:
        """Nanoseconds of half of `count` connect() calls or less."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{mode} {target} {count}\n")
        self.process.stdin.flush()
        spent, answered = self.process.stdout.readline().split()
        if answered != PORTS[target]:
            raise RuntimeError(f"a {target} connection was answered by port {answered}, not {PORTS[target]}")
        return float(spent)


@dataclass(frozen=True)
class Cable:
    """A pod-to-be and a server outside, which answers for all of 10.0.0.0/8."""

    pod: Path
    peer: Path


@contextmanager
def cabled() -> Iterator[Cable]:
    """Two namespaces with a cable, gone afterwards."""
    tag = secrets.token_hex(3)
    cable = Cable(*(NETNS / f"sidestep-{tag}-{name}" for name in ("pod", "peer")))
    with ExitStack() as undo:
        for path in (cable.pod, cable.peer):
            make_netns(path)
            undo.callback(subprocess.run, ["ip", "netns", "del", path.name], check=True)
        link = f"link add eth0 netns {cable.pod.name} type veth peer name eth0 netns {cable.peer.name}"
        subprocess.run(["ip", *link.split()], check=True)
        for path, number in ((cable.pod, 2), (cable.peer, 1)):
            for command in (f"addr add 192.0.2.{number}/24 dev eth0", "link set eth0 up"):
                subprocess.run(["ip", "-n", path.name, *command.split()], check=True)
        subprocess.run(["ip", "-n", cable.pod.name, "route", "add", "10.0.0.0/8", "via", "192.0.2.1"], check=True)
        subprocess.run(["ip", "-n", cable.peer.name, "route", "add", "local", "10.0.0.0/8", "dev", "lo"], check=True)
        yield cable


@contextmanager
def running(netns: Path, cgroup: Path | None, uid: int, code: str, *args: str) -> Iterator["subprocess.Popen[str]"]:
    """A resident process; ready when it is yielded."""
    argv = [*PYTHON, code, *args]
    with popen(netns, cgroup, argv, uid, uid, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"a process in {netns} did not start")
            yield process
        finally:
            process.kill()


def compare(name: str, client: Client, sides: tuple[Callable[[], None], ...], targets: str, rounds: int) -> None:
    """Print how much longer connect() takes on the first side than on the second: median, lowest and highest round."""
    cases = [(mode, target) for target in targets.split() for mode in ("nonblocking", "blocking")]
    ratios: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        times: dict[int, dict[tuple[str, str], float]] = {}
        for side in sorted((0, 1), reverse=bool(number % 2)):
            sides[side]()
            for case in cases:
                client.median(*case, 300)  # what was written for the other side leaves the caches
            times[side] = {case: client.median(*case, 1500) for case in cases}
        for case in cases if number else ():  # the first round warms up
            ratios[case].append(times[0][case] / times[1][case])
    for mode, target in cases:
        each = ratios[mode, target]
        spread = f"{statistics.median(each):.2f}   ({min(each):.2f}–{max(each):.2f})"
        click.echo(f"  {name:28}{target:10}{mode:13}{spread}")


def noting(client: Client, tables: Tables, cookie: int, rounds: int) -> None:
    """Print how much longer a call takes because what goes past the proxy is noted.

    The programs note nothing of a pod that has no entry for its sums.
    """
    spent: dict[str, list[float]] = {target: [] for target in ("captured", "direct", "datagram")}
    for number in range(rounds + 1):
        for target, found in spent.items():
            times = {}
            for is_noted in (True, False) if number % 2 else (False, True):
                if is_noted:
                    tables.coverage.begin(Cookie(cookie))
                else:
                    tables.coverage.remove(Cookie(cookie))
                client.median("nonblocking", target, 300)
                times[is_noted] = client.median("nonblocking", target, 3000)
            if number:  # the first round warms up
                found.append(times[True] - times[False])
    tables.coverage.begin(Cookie(cookie))
    for target, found in spent.items():
        spread = f"{statistics.median(found):+.0f} ns ({min(found):+.0f} to {max(found):+.0f})"
        click.echo(f"  {'noted / not noted':28}{target:23}{spread}")


def outside(cable: Cable, rounds: int) -> None:
    """A process below the programs' cgroup, in a namespace that is not enrolled."""
    with (
        scratch_pins() as (pins, cgroup),
        running(cable.peer, None, 0, SERVER, PORTS["direct"]),
        running(cable.pod, cgroup, APP, CLIENT) as process,
    ):
        sides = (lambda: _done(attach_programs(pins, cgroup)), lambda: _done(detach_programs(pins)))
        compare("outside, attached / not", Client(process), sides, "direct", rounds)
        process.kill()  # its cgroup goes with the pins
        process.wait()


def inside(cable: Cable, rounds: int) -> None:
    """A mesh pod's process, with more or fewer rules, and with more or fewer pods."""
    with ExitStack() as stack:
        pins, cgroup = stack.enter_context(scratch_pins())
        attach_programs(pins, cgroup)
        tables = stack.enter_context(Tables(pins))
        netns = stack.enter_context(cable.pod.open())
        enrolments = Enrolments(pins, tables)
        sandbox = visit(netns.fileno(), look)
        visit(netns.fileno(), lambda rtnl: prepare(rtnl, sandbox, ipv6=False))
        stack.callback(enrolments.remove, sandbox.cookie)
        _enrol(enrolments, sandbox, FEW, netns.fileno())
        stack.enter_context(running(cable.peer, None, 0, SERVER, PORTS["direct"]))
        stack.enter_context(running(cable.pod, cgroup, PROXY, SERVER, PORTS["captured"]))
        client = Client(stack.enter_context(running(cable.pod, cgroup, APP, CLIENT)))

        def rules(policy: CapturePolicy) -> None:
            _enrol(enrolments, sandbox, policy, netns.fileno())

        sides = (lambda: rules(MANY), lambda: rules(FEW))
        noting(client, tables, sandbox.cookie, rounds)
        compare(f"rules: {2 * RULES:,} / 1", client, sides, "captured direct", rounds)
        rules(FEW)
        enrolling(rules, rounds)
        others = [_neighbour(number) for number in range(PODS - 1)]

        def crowd() -> None:
            for neighbour, descriptor in others:
                _enrol(enrolments, neighbour, FEW, descriptor)

        def desert() -> None:
            for neighbour, _ in others:
                enrolments.remove(neighbour.cookie)

        compare(f"pods: {PODS} / 1", client, (crowd, desert), "captured direct", rounds)
        desert()
        for _, descriptor in others:
            os.close(descriptor)


def enrolling(enrol: Callable[[CapturePolicy], None], rounds: int) -> None:
    """Print how long ten thousand ranges take from annotation to maps: here seconds are the point."""
    text = ",".join(map(str, MANY.exclude_outbound))
    metadata = {"name": "pod", "annotations": {EXCLUDE_OUTBOUND_RANGES: text}}
    pod = Pod.model_validate({"metadata": metadata})
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        enrol(policy_of(pod))
        seconds.append(time.perf_counter() - started)
        enrol(FEW)
    spread = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}–{max(seconds):.2f})"
    click.echo(f"  enrolling a pod with {RULES:,} excluded ranges       {spread}")


def _enrol(enrolments: Enrolments, sandbox: Sandbox, policy: CapturePolicy, netns: int) -> None:
    identity = Identity("uid", "pod", "default", f"container-{sandbox.cookie}", "bench", "eth0")
    enrolments.add(sandbox.cookie, entries_of(identity, policy, sandbox, (PROXY, PROXY)), netns)


def _neighbour(number: int) -> tuple[Sandbox, int]:
    """A namespace without a name and with nothing in it, and an address to enrol it with."""
    made: list[tuple[int, int]] = []

    def make() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0:
            made.append((own_cookie(), os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    cookie, descriptor = made[0]
    address = IPv4Address("198.18.0.1") + number
    return Sandbox(cookie, (InterfaceAddress(address, 2, address),)), descriptor


def _done(_: object) -> None:
    """A step whose result is of no interest."""


@click.command()
@click.option("--rounds", default=9, show_default=True, help="Times both sides of a comparison take turns.")
def bench(rounds: int) -> None:
    """Compare the cost of connect() between few and many rules, and few and many pods."""
    with cabled() as cable:
        click.echo(f"  {'connect() takes':28}{'':23}ratio  (lowest–highest of {rounds} rounds)")
        inside(cable, rounds)
        outside(cable, rounds)


if __name__ == "__main__":
    bench()
