"""`python -m tests.kernels.limited_proxy`: a receiving Envoy in a container with little memory.

One line of JSON a try. The applications have no limit.
"""

import json
from contextlib import ExitStack
from pathlib import Path

from bpf.layout import LEVELS
from tests.kernels.limits import MIB, PIPES, Fate, kill_after, oom_kills
from tests.lab.inside import popen
from tests.lab.late import complete_transfers, end_of_transfers, wait_for_listener
from tests.lab.levels import set_level
from tests.lab.node import Node
from tests.lab.pod import APP_ID, APP_TCP_PORT, Pod

# MiB beyond what Envoy has when it is idle
LIMITS, TRIES = (16, 24, 48), 3


def main() -> None:
    """A node as in other tests, whose cgroups have the memory controller."""
    node = Node()
    node.agent.options = ["--acceleration", "off"]
    with node:
        for each in (node.cgroup, node.kubepods):
            (each / "cgroup.subtree_control").write_text("+memory")
        for name in ("alpha", "beta"):
            pod = Pod(node, name, annotations={"sidestep.io/acceleration": "full"}, app=False)
            node.pods[name] = pod
            pod.create()
        apart = node.kubepods / "application"
        apart.mkdir()
        for mib in LIMITS:
            for level in LEVELS:
                for _ in range(TRIES):
                    found = Fate("proxy", mib, level, *_try(node.pods["alpha"], node.pods["beta"], apart, level, mib))
                    print(json.dumps(found.document()), flush=True)


def _try(source: Pod, target: Pod, apart: Path, level: str, mib: int) -> tuple[int, int]:
    limit = target.cgroup / "memory.max"
    target.envoy.stop()
    limit.write_text("max")
    target.envoy.start()
    set_level(target.node, level)
    kills = oom_kills(target.cgroup)
    with ExitStack() as stack:
        reader = popen(target.netns, apart, end_of_transfers("read", "", APP_TCP_PORT), APP_ID, APP_ID, **PIPES)
        kill_after(reader, stack)
        wait_for_listener(reader)
        limit.write_text(str(int((target.cgroup / "memory.current").read_text()) + mib * MIB))
        writer = source.popen(end_of_transfers("write", str(target.ip4), APP_TCP_PORT), **PIPES)
        kill_after(writer, stack)
        return complete_transfers(writer, reader), oom_kills(target.cgroup) - kills


if __name__ == "__main__":
    main()
