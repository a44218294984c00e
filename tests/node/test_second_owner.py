"""Somebody else owns sockets on this node: acceleration is off, and an operator sees who it is."""

from bpf import syscalls
from bpf.syscalls import Descriptor
from tests.datapath.test_owners import VERDICT
from tests.lab.levels import start_agent
from tests.lab.machine import acceleration_needed, other_owner_for_all
from tests.lab.node import Node
from tests.lab.objects import create_sockhash, load_program
from tests.node.sidestep import document, sidestep
from tests.node.test_status import options


def test_status_names_who_else_owns_sockets(node: Node) -> None:
    with acceleration_needed():
        node.agent.terminate()
        start_agent(node, "proxy")
    # as short as can be: the other agents of this machine would see it, too
    with (
        other_owner_for_all(),
        Descriptor(create_sockhash(4, 4, 16, "their_sockets")) as sockets,
        Descriptor(load_program(*VERDICT, "their_verdict")) as program,
    ):
        syscalls.attach_to_map(program.fd, sockets.fd, 7, "their_sockets")
        done = accelerated(node)
        found = document(node, "status", *options(node)[2:], status=1)["acceleration"]
        table = sidestep(node, "status", *options(node)[2:]).stdout
    assert (found["level"], found["wanted"]) == ("off", "proxy")
    assert found["reason"].startswith("another program on this node owns sockets: ")
    assert "their_verdict on map their_sockets (id " in found["reason"]
    assert done == f"acceleration: off ({found['reason']})"
    assert "acceleration: off instead of proxy (another program on this node owns sockets: " in table
    assert "✗ acceleration: off instead of proxy: another program on this node owns sockets: " in table
    with acceleration_needed():
        assert accelerated(node).split()[:2] == ["acceleration:", "proxy"]


def accelerated(node: Node) -> str:
    """What the node says that is to be at level proxy."""
    return sidestep(node, "accelerate", "proxy", "--cni-agent-run-dir", node.run_dir, source=False).stdout.strip()
