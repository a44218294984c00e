"""What is measured without load: by name, how, and for how many rounds."""

from collections.abc import Callable
from dataclasses import asdict

from tests.bench import cni, memory, tax
from tests.bench.mesh import establishing
from tests.bench.mesh.blocks import Block
from tests.bench.mesh.ratios import spread

_ADDS = 32  # a side and round


def adding(rounds: int) -> Block:
    """A whole CNI ADD against loading Istio's rules; `make bench-cni` has more of it."""
    rows, data = [], {}
    for parallel, found in cni.compared(rounds, _ADDS):
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            ratios = [
                cni.percentile(each["sidestep"], share) / cni.percentile(each["iptables"], share) for each in found
            ]
            ratio = spread(ratios)
            assert ratio is not None
            rows.append([f"{parallel} in parallel, {name}", str(ratio)])
            data[f"{parallel} {name}"] = asdict(ratio)
    note = (
        "The shim's whole ADD against a running agent, as a ratio to iptables-restore and ip6tables-restore with the\n"
        f"rules of a default pod. {_ADDS} set-ups a side and round."
    )
    return Block("CNI ADD against iptables-restore", ["ADD", "ratio to iptables"], rows, note, data)


# by the name that --only takes; what is given is the number of rounds of the load
BLOCKS: dict[str, Callable[[int], Block]] = {
    "establishing": lambda rounds: establishing.block(2 * rounds),
    "tax": lambda rounds: tax.block(2 * rounds),
    "memory": lambda rounds: memory.block(min(rounds, 3)),
    "cni": lambda rounds: adding(2 * rounds),
}
