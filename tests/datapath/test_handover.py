"""How the proxy gets the original destination of a connection: in time, and no other than the one that was captured."""

import os
import struct

import pytest

from bpf import syscalls
from bpf.hooks import SOCK_OPS
from bpf.layout import Word
from bpf.syscalls import Descriptor
from tests.datapath.test_outbound import address, plain
from tests.datapath.test_reconnecting import SOCKET, Told
from tests.datapath.wires import APP, PROXY, Wire
from tests.lab.inside import PYTHON
from tests.lab.objects import create_array
from tests.lab.waiting import wait_until

# A proxy whose listeners take data with the SYN, and need no cookie for that (TCP_FASTOPEN, ip-sysctl: tcp_fastopen)
QUICK = """
import json, socket, struct, sys, threading
open("/proc/sys/net/ipv4/tcp_fastopen", "w").write("1543")  # 0x607: client and server, both without a cookie
def serve(family, any_address):
    listener = socket.socket(family)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind((any_address, 15001))
    listener.listen(16)
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
def accept(listener):
    while True:
        connection = listener.accept()[0]
        said = connection.recv(100).decode()
        early = bool(connection.getsockopt(socket.IPPROTO_TCP, 11, 104)[5] & 32)  # tcpi_options: TCPI_OPT_SYN_DATA
        try:
            if connection.family == socket.AF_INET:
                raw = connection.getsockopt(socket.SOL_IP, 80, 16)
                found = [socket.inet_ntop(socket.AF_INET, raw[4:8]), struct.unpack("!H", raw[2:4])[0]]
            else:
                raw = connection.getsockopt(socket.IPPROTO_IPV6, 80, 28)
                found = [socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack("!H", raw[2:4])[0]]
        except OSError as error:
            found = error.strerror
        connection.sendall(json.dumps([said, early, found]).encode())
        connection.close()
serve(socket.AF_INET, "0.0.0.0")
serve(socket.AF_INET6, "::")
print("ready", flush=True)
sys.stdin.read()
"""

# Sends with the SYN, by sendto() without a connect() or by the first send() after one.
EAGER = """
import json, socket, sys
how, host, port = sys.argv[1:]
client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
client.settimeout(3)
if how == "sendto":
    client.sendto(b"hello", socket.MSG_FASTOPEN, (host, int(port)))
else:
    client.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
    client.connect((host, int(port)))
    client.sendall(b"hello")
print(json.dumps([json.loads(client.recv(1000)), client.getpeername()[:2]]))
"""


# Another program of type sock_ops: as a socket begins to listen, it asks to be called for round-trip times too, and it
# counts those calls in its only map. Opcode, registers (source << 4 | destination), offset, immediate.
ROUND_TRIPS = (
    (0xBF, 0x16, 0, 0),  # r6 = r1, the context
    (0x61, 0x62, 0, 0),  # r2 = op
    (0x15, 0x02, 2, 11),  # if op is TCP_LISTEN_CB, ask
    (0x15, 0x02, 4, 12),  # if op is RTT_CB, count
    (0x05, 0x00, 12, 0),  # else end
    (0xB7, 0x02, 0, 8),  # ask: r2 = RTT_CB_FLAG
    (0x85, 0x00, 0, 59),  # sock_ops_cb_flags_set(r1, r2)
    (0x05, 0x00, 9, 0),  # end
    (0x62, 0x0A, -4, 0),  # count: the key, 0
    (0xBF, 0xA2, 0, 0),
    (0x07, 0x02, 0, -4),  # r2 = its address
    (0x18, 0x51, 0, 0),  # r1 = the map of index 0
    (0x00, 0x00, 0, 0),
    (0x85, 0x00, 0, 1),  # map_lookup_elem(r1, r2)
    (0x15, 0x00, 2, 0),
    (0xB7, 0x01, 0, 1),
    (0xC3, 0x10, 0, 0),  # one more, atomically
    (0xB7, 0x00, 0, 1),  # end: return 1
    (0x95, 0x00, 0, 0),
)


@pytest.mark.parametrize("family", ["ip4", "ip6"])
@pytest.mark.parametrize("how", ["sendto", "connect"])
def test_data_that_come_with_the_syn_have_their_original_destination(wire: Wire, how: str, family: str) -> None:
    wire.enrol()
    wire.pod.start([*PYTHON, QUICK], 0, PROXY)
    target, before = address(wire, family), wire.kernel.tables.handshakes.count()
    for _ in range(3):
        seen, peer = wire.pod.python(EAGER, how, target, 80)
        assert (seen, peer) == (["hello", True, [plain(target), 80]], [target, 80])
    assert wire.kernel.tables.handshakes.count() == before


@pytest.mark.parametrize("port", [15001, 15006])
def test_a_socket_that_was_captured_before_brings_no_destination_to_another_address(wire: Wire, port: int) -> None:
    wire.mesh()
    sock = Told(wire.pod.start([*PYTHON, SOCKET], APP))
    sock(f"connect {wire.peer.ip4} 8080")
    sock("disconnect")
    sock(f"connect 127.0.0.1 {port}")
    assert f'"original": ["127.0.0.1", {port}]' in sock("receive")


def test_flags_of_another_program_stay_set(wire: Wire) -> None:
    """Another program asks for round-trip times as the proxy begins to listen; what is accepted inherits that."""
    code = b"".join(struct.pack("=BBhi", *each) for each in ROUND_TRIPS)
    below = wire.kernel.cgroup / "below"  # its programs run first
    below.mkdir()
    try:
        with (
            Descriptor(create_array(4, 1, "round_trips")) as times,
            Descriptor(syscalls.load_program("their_sockops", SOCK_OPS, 3, code, [times.fd])) as program,
            Descriptor(os.open(below, os.O_RDONLY)) as cgroup,
            Descriptor(syscalls.create_link(program.fd, cgroup.fd, 3, "their_sockops")),
        ):
            wire.enrol()
            wire.pod.cgroup = below
            wire.pod.serve("inbound", "15006", uid=PROXY)
            assert wire.peer.dial(wire.pod.ip4, 8080, uid=0)["who"] == "inbound"
            seen = Word()
            assert syscalls.map_lookup(times.fd, Word(0), seen)
            assert seen.word > 0
    finally:
        wire.pod.stop()
        wait_until(lambda: not (below / "cgroup.procs").read_text(), "the proxy to end")
        below.rmdir()
