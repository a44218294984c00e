"""What a hostile process of a mesh pod tries, and what becomes of it (docs/security.md)."""

import subprocess
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from bpf import syscalls
from bpf.syscalls import Descriptor
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import APP, PROXY, Wire, ip_command
from tests.lab.inside import PYTHON, popen

# A user namespace of the caller's own, in which it has every capability.
OWN_USERS = """
import ctypes, errno, json, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
NEWUSER, NEWNET = 0x10000000, 0x40000000

def unshare(flags):
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")

def become(inside):
    uid, gid = os.getuid(), os.getgid()
    unshare(NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)

def connect(sock, address, port):
    sock.settimeout(5)
    try:
        sock.connect((address, int(port)))
        return json.loads(sock.makefile().readline())["who"]
    except OSError as error:
        return error.strerror or "timed out"
"""
# The ways of bpf(2) to what somebody else has loaded (commands of uapi/linux/bpf.h, system call 321 of x86-64).
REACH = """
def bpf(command, attributes):
    room = ctypes.create_string_buffer(attributes.ljust(128, b"\\0"), 128)
    found = libc.syscall(321, command, room, 128)
    return "reached" if found >= 0 else errno.errorcode[ctypes.get_errno()]

def pin(path):
    name = ctypes.create_string_buffer(path.encode())
    return bpf(7, struct.pack("Q", ctypes.addressof(name)))

def reach(paths, cgroup, map_id, program_id, link_id):
    attached = os.open(cgroup, os.O_RDONLY)
    return {
        **{path: pin(path) for path in paths.split()},
        "programs of the cgroup": bpf(16, struct.pack("II", attached, 10)),
        "map": bpf(14, struct.pack("I", int(map_id))),
        "program": bpf(13, struct.pack("I", int(program_id))),
        "link": bpf(30, struct.pack("I", int(link_id))),
    }
"""
WITHOUT_RIGHTS = {"EPERM", "EACCES"}


def reach(wire: Wire) -> list[str]:
    """Arguments of the snippet's reach(): our pins, the cgroup, and numbers that anybody may guess."""
    pins = wire.kernel.pins
    found = [pins.maps / "pods", pins.maps / "events", pins.programs / "connect4", pins.links / "connect4"]
    with Descriptor(syscalls.open_pin(pins.maps / "pods")) as opened:
        numbers = [syscalls.map_info(opened.fd).id]
    with Descriptor(syscalls.open_pin(pins.programs / "connect4")) as opened:
        numbers.append(syscalls.program_info(opened.fd).id)
    with Descriptor(syscalls.open_pin(pins.links / "connect4")) as opened:
        numbers.append(syscalls.link_info(opened.fd).id)
    return [" ".join(map(str, found)), str(wire.kernel.cgroup), *map(str, numbers)]


@pytest.mark.claim("see or change maps, programs or the socket")
@pytest.mark.claim("see other pods' events or destinations")
@pytest.mark.claim("bpf(2) asks for capabilities of the node's")
@pytest.mark.claim("Only root can read it")
@pytest.mark.parametrize("how", ["", "become(0); "])
def test_a_process_reaches_no_map_program_or_link_though_it_have_every_capability_in_its_user_namespace(
    wire: Wire, how: str
) -> None:
    wire.enrol()
    found = wire.pod.python(f"{OWN_USERS}{REACH}\n{how}print(json.dumps(reach(*sys.argv[1:])))", *reach(wire))
    assert len(found) == 8 and set(found.values()) <= WITHOUT_RIGHTS, found


@pytest.mark.claim("see or change maps, programs or the socket")
def test_a_containers_root_that_has_the_networks_capabilities_alone_reaches_none_by_its_number(wire: Wire) -> None:
    wire.enrol()
    code = f"{OWN_USERS}{REACH}\nprint(json.dumps(reach(*sys.argv[1:])))"
    kept = "-all,+net_admin,+net_raw,+net_bind_service,+setuid,+setgid,+chown,+kill"
    limits = [f"--{which}={kept}" for which in ("bounding-set", "inh-caps")]
    _, *rest = reach(wire)
    argv = ["setpriv", *limits, *PYTHON, code, "", *rest]
    process = popen(wire.pod.path, wire.pod.cgroup, argv, 0, 0, stdout=subprocess.PIPE, text=True)
    found = process.communicate(timeout=20)[0]
    # it may ask which programs are attached where: their numbers, no more
    assert found == ('{"programs of the cgroup": "reached", "map": "EPERM", "program": "EPERM", "link": "EPERM"}\n')


@pytest.fixture
def delegated(wire: Wire) -> Iterator[Path]:
    """A cgroup of the pod's that its user may change, and so divide."""
    made = wire.kernel.cgroup / "delegated"
    made.mkdir()
    for path in (made, made / "cgroup.procs", made / "cgroup.subtree_control"):
        subprocess.run(["chown", str(APP), path], check=True)
    yield made
    wire.pod.stop()
    (made / "child").rmdir()
    made.rmdir()


@pytest.mark.claim("escape capture by moving to a child cgroup")
def test_a_process_in_a_child_cgroup_of_its_own_making_is_captured(wire: Wire, delegated: Path) -> None:
    wire.mesh()
    move = (
        "child = sys.argv[1] + '/child'\nos.mkdir(child)\nopen(child + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "found = [connect(socket.socket(), *sys.argv[2:])]\n"
        "try:\n    open(os.path.dirname(sys.argv[1]) + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "except OSError as error:\n    found.append(error.strerror)\nprint(json.dumps(found))"
    )
    wire.pod.cgroup = delegated
    found = wire.pod.python(f"{OWN_USERS}\n{move}", delegated, wire.peer.ip4, 8080)
    assert found == ["outbound", "Permission denied"]  # and there is no way up


@pytest.mark.claim("ids count as the node sees them")
@pytest.mark.parametrize("inside", [0, PROXY])
def test_the_proxys_id_in_a_user_namespace_of_its_own_makes_no_process_the_proxy(wire: Wire, inside: int) -> None:
    wire.mesh()
    code = f"{OWN_USERS}\nbecome({inside})\nprint(json.dumps(connect(socket.socket(), *sys.argv[1:])))"
    assert wire.pod.python(code, wire.peer.ip4, 8080) == "outbound"


@pytest.mark.claim("a socket belongs to the namespace that it was opened in")
def test_a_socket_of_the_pods_is_captured_wherever_its_process_goes(wire: Wire) -> None:
    wire.mesh()
    code = (
        "sock = socket.socket()\nbecome(0)\nunshare(NEWNET)\n"
        "print(json.dumps([connect(sock, *sys.argv[1:]), connect(socket.socket(), *sys.argv[1:])]))"
    )
    assert wire.pod.python(f"{OWN_USERS}\n{code}", wire.peer.ip4, 8080) == ["outbound", "Network is unreachable"]


@pytest.mark.claim("become the proxy's listener for another pod")
@pytest.mark.claim("receive its connections")
def test_a_listener_of_another_pod_gets_nothing_though_it_have_the_address_the_port_and_the_proxys_user(
    make_wire: Callable[[], Wire],
) -> None:
    hostile, victim = make_wire(), make_wire()  # with the same addresses
    for wire in (hostile, victim):
        wire.enrol()
    hostile.pod.serve("hostile", "15006", uid=PROXY)
    assert hostile.peer.dial(hostile.pod.ip4, 8080)["who"] == "hostile"
    assert victim.peer.dial(victim.pod.ip4, 8080) == {"error": "Connection refused"}


def translate(wire: Wire, asked: int, reached: int) -> None:
    """Netfilter rules of the pod's own, which take CAP_NET_ADMIN there: connections to one port reach another."""
    rule = f"-A OUTPUT -p tcp --dport {asked} -j DNAT --to-destination {wire.peer.ip4}:{reached}"
    argv = ["nsenter", f"--net={wire.pod.path}", "iptables-nft-restore", "--wait=10"]
    subprocess.run(argv, input=f"*nat\n{rule}\nCOMMIT\n", text=True, check=True)


@pytest.mark.claim("it gets past ports that the pod denies")
@pytest.mark.claim("CAP_NET_ADMIN in the pod gets past it")
def test_who_may_administer_the_pods_network_gets_past_its_denied_ports(wire: Wire) -> None:
    """Nobody else does; the page says so."""
    wire.enrol(CapturePolicy(include_outbound_ports=frozenset(), deny_outbound_ports=frozenset({9090})))
    wire.peer.serve("remote", "9090", uid=0)
    assert wire.pod.dial(wire.peer.ip4, 9090, uid=PROXY)["error"] == "Operation not permitted"
    translate(wire, 9091, 9090)
    assert wire.pod.dial(wire.peer.ip4, 9091, uid=PROXY)["who"] == "remote"


@pytest.mark.claim("forwarding for a network namespace behind it")
@pytest.mark.claim("Packets that a pod forwards are not captured")
def test_a_namespace_behind_the_pod_is_not_captured(wire: Wire) -> None:
    """It takes CAP_NET_ADMIN in the pod: its packets are forwarded."""
    wire.mesh()
    name = f"{wire.pod.path.name}-behind"
    ip_command("netns", "add", name)
    try:
        ip_command("-n", wire.pod.path.name, "link", "add", "in", "type", "veth", "peer", "name", "eth0", "netns", name)
        for where, device, address in ((wire.pod.path.name, "in", "10.77.0.1/24"), (name, "eth0", "10.77.0.2/24")):
            ip_command("-n", where, "addr", "add", address, "dev", device)
            ip_command("-n", where, "link", "set", device, "up")
        ip_command("-n", name, "route", "add", "default", "via", "10.77.0.1")
        ip_command("-n", wire.peer.path.name, "route", "add", "10.77.0.0/24", "via", wire.pod.ip4)
        argv = ["nsenter", f"--net={wire.pod.path}", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]
        subprocess.run(argv, check=True)
        code = f"{OWN_USERS}\nprint(json.dumps(connect(socket.socket(), *sys.argv[1:])))"
        argv = [*PYTHON, code, str(wire.peer.ip4), "8080"]
        behind: Any = popen(
            Path("/run/netns") / name, wire.pod.cgroup, argv, APP, APP, stdout=subprocess.PIPE, text=True
        )
        assert behind.communicate(timeout=20)[0] == '"remote"\n'
    finally:
        ip_command("netns", "del", name)


LATER = """
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
stream = sock.makefile()
stream.readline()
print("ready", flush=True)
sys.stdin.readline()
sock.send(b"x")
print(json.loads(stream.readline())["who"], flush=True)
"""


@pytest.mark.claim("connections older than the enrolment")
def test_a_connection_that_is_older_than_the_enrolment_goes_on_past_the_proxy(wire: Wire) -> None:
    wire.peer.serve("remote", "8080", uid=0)
    client = wire.pod.start([*PYTHON, f"{OWN_USERS}{LATER}", str(wire.peer.ip4), "8080"], APP)
    wire.enrol()
    wire.pod.serve("outbound", "15001", uid=PROXY)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
    assert client.communicate("\n", timeout=10)[0] == "remote\n"


@pytest.mark.claim("the capture of a connect() cannot be set up (memory)")
def test_a_connection_that_there_is_no_memory_to_capture_is_refused(wire: Wire) -> None:
    wire.mesh()
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
    argv = ["nsenter", f"--net={wire.pod.path}", "sh", "-c", "echo 0 > /proc/sys/net/core/optmem_max"]
    subprocess.run(argv, check=True)  # what is stored with sockets counts as their options' memory
    assert wire.pod.dial(wire.peer.ip4, 8080)["error"] == "Operation not permitted"


# The 20th percentile of many connect() to a port of its own where nobody listens, in microseconds
CONNECTS = """
took = []
for _ in range(2000):
    sock = socket.socket()
    started = time.perf_counter()
    try:
        sock.connect(("127.0.0.1", 9))
    except OSError:
        pass
    took.append(time.perf_counter() - started)
    sock.close()
print(json.dumps(sorted(took)[400] * 1e6))
"""


@pytest.mark.claim("slow others down by its policy")
def test_a_connect_takes_as_long_beside_a_pod_with_tens_of_thousands_of_rules(make_wire: Callable[[], Wire]) -> None:
    hostile, victim = make_wire(), make_wire()
    victim.enrol()
    measure = f"{OWN_USERS}import time\n{CONNECTS}"
    before = min(victim.pod.python(measure) for _ in range(3))
    ranges = tuple(IPv4Network((10 << 24 | number << 8, 24)) for number in range(20_000))
    hostile.enrol(CapturePolicy(exclude_outbound=ranges, exclude_outbound_ports=frozenset(range(20_000))))
    after = min(victim.pod.python(measure) for _ in range(3))
    assert after < 1.5 * before, (before, after)


DATAGRAM = """
kind = socket.AF_INET6, socket.SOCK_DGRAM
with socket.socket(*kind) as receiver, socket.socket(*kind) as sender:
    receiver.bind((sys.argv[1], 5353))
    receiver.settimeout(0.5)
    sender.sendto(b"heard", (sys.argv[1], 5353))
    try:
        print(json.dumps(receiver.recv(9).decode()))
    except OSError:
        print(json.dumps("nothing"))
"""


@pytest.mark.claim("Datagrams over IPv6 from one of the pod's own addresses")
def test_a_pods_own_datagrams_over_ipv6_to_a_port_that_it_denies_are_dropped_but_on_loopback(wire: Wire) -> None:
    wire.enrol(CapturePolicy(dual_stack=True, deny_inbound_ports=frozenset({5353})))
    code = f"{OWN_USERS}{DATAGRAM}"
    assert [wire.pod.python(code, ip) for ip in (wire.pod.ip6, "::1")] == ["nothing", "heard"]
