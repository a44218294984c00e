"""What an agent takes of its node. Times are for `make bench-node`: they say little while tests run beside."""

from bpf.attachment import detach_programs
from bpf.pins import Pins
from tests.lab.apiserver import ApiServer
from tests.lab.node import Node
from tests.lab.tenants import Tenants, resident

MOST = 96  # MiB with 250 pods; a compiler that stays resident, or a client's generated models, show with fewer


def test_an_agent_of_many_pods_stays_small_however_it_came_to_them() -> None:
    with ApiServer().running() as api, Node(api=api) as node:
        tenants = Tenants(node, 60)
        assert node.entries()["pods"] == len(tenants.mesh) == 30
        assert resident(node.agent.pid, "VmHWM") <= MOST

        node.agent.terminate()
        detach_programs(Pins(node.bpffs))
        node.agent.start()
        assert node.entries()["pods"] == len(tenants.mesh)
        assert resident(node.agent.pid, "VmHWM") <= MOST
