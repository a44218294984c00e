"""Who owns a connection: the ids a socket was opened with, in the initial user namespace."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.errors import SandboxInvalid
from cni.netns.userns import outside_ids
from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import APP, PROXY, Wire
from tests.lab.inside import PYTHON
from tests.lab.userns import mapped_netns

# Opens a socket as root, then becomes somebody else and connects it.
OPEN_THEN_SETUID = """
import json, os, socket, sys
s = socket.socket()
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
s.connect((sys.argv[1], 8080))
print(s.makefile().readline())
"""

# Opens a socket as one user and has another process of another user connect it.
PASS_ON = """
import json, os, socket, sys
target, opener, connector = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ours, theirs = socket.socketpair()
if os.fork() == 0:
    os.setgid(opener); os.setuid(opener)
    opened = socket.socket()
    socket.send_fds(theirs, [b"x"], [opened.fileno()])
    os._exit(0)
os.setgid(connector); os.setuid(connector)
s = socket.socket(fileno=socket.recv_fds(ours, 1, 1)[1][0])
s.connect((target, 8080))
print(s.makefile().readline())
"""


def test_a_socket_opened_before_setuid_keeps_its_first_owner(wire: Wire) -> None:
    wire.mesh()
    assert wire.pod.python(OPEN_THEN_SETUID, wire.peer.ip4, PROXY, uid=0)["who"] == "outbound"


@pytest.mark.parametrize(("opener", "connector", "who"), [(PROXY, APP, "remote"), (APP, PROXY, "outbound")])
def test_a_passed_socket_belongs_to_whoever_opened_it(wire: Wire, opener: int, connector: int, who: str) -> None:
    wire.mesh()
    assert wire.pod.python(PASS_ON, wire.peer.ip4, opener, connector, uid=0)["who"] == who


@pytest.mark.claim("belong to the process that calls connect()")
def test_a_socket_older_than_the_enrolment_belongs_to_whoever_connects_it(wire: Wire) -> None:
    code = """
import os, socket, sys
s = socket.socket()
print("ready", flush=True)
sys.stdin.readline()
os.setgid(1337); os.setuid(1337)
s.connect((sys.argv[1], 8080))
print(s.makefile().readline(), flush=True)
"""
    early = wire.pod.start([*PYTHON, code, str(wire.peer.ip4)], uid=0)
    wire.mesh()
    assert early.stdin is not None and early.stdout is not None
    early.stdin.write("\n")
    early.stdin.flush()
    assert '"remote"' in early.stdout.readline()


@pytest.mark.parametrize(("uid", "gid", "who"), [(PROXY, APP, "remote"), (APP, PROXY, "remote"), (0, 0, "outbound")])
def test_either_id_makes_the_proxy(wire: Wire, uid: int, gid: int, who: str) -> None:
    wire.mesh()
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=uid, gid=gid)["who"] == who


def test_other_ids_than_1337_are_taken_from_the_proxys_container(wire: Wire) -> None:
    wire.mesh(CapturePolicy(proxy_uid=1000670000, proxy_gid=1000670001))
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=1000670000, gid=0)["who"] == "remote"
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=0, gid=1000670001)["who"] == "remote"
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=PROXY)["who"] == "outbound"


@pytest.fixture
def owned() -> Iterator[Path]:
    with mapped_netns() as path:
        yield path


def test_ids_are_translated_through_the_namespaces_user_namespace(owned: Path) -> None:
    with owned.open() as netns:
        assert outside_ids(netns.fileno(), 1337, 1338) == (201337, 201338)


def test_an_id_that_is_not_mapped_is_refused(owned: Path) -> None:
    with owned.open() as netns, pytest.raises(SandboxInvalid, match="proxy's uid 100000 does not exist"):
        outside_ids(netns.fileno(), 100000, 1337)


def test_without_a_user_namespace_of_its_own_ids_are_as_they_are(wire: Wire) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with wire.pod.path.open() as netns:
        assert outside_ids(netns.fileno(), 1337, 0) == (1337, 0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_proxy_of_a_pod_with_its_own_users_is_known_by_its_outside_ids(wire: Wire) -> None:
    """`hostUsers: false`: 1337 inside is another id outside, and 1337 outside is nobody in particular."""
    wire.mesh()
    entry = wire.kernel.enrolments.entry(wire.sandbox.cookie)
    assert entry is not None
    assert (entry.proxy_uid, entry.proxy_gid) == (PROXY, PROXY)
    wire.enrol(CapturePolicy(proxy_uid=201337, proxy_gid=201337))
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=201337)["who"] == "remote"
    assert wire.pod.dial(wire.peer.ip4, 8080, uid=PROXY)["who"] == "outbound"
