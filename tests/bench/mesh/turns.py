"""How pairs take turns, so that what drifts with the machine is in every pair's figures."""

import random
from collections.abc import Callable
from pathlib import Path

from tests.bench.mesh.load import Sample
from tests.bench.mesh.measure import Unreadable
from tests.bench.mesh.results import Results
from tests.bench.mesh.workloads import WORKLOADS, Workload

# loads the pair of that name with a workload, in the round of that number; raises Unreadable
Ask = Callable[[str, Workload, int], Sample]


def take_turns(results: Results, ask: Ask, path: Path, say: Callable[[str], object]) -> None:
    """Every round: each workload over every pair, in an order drawn anew. Kept in `path` after each round."""
    draw = random.Random(results.seed)
    for number in range(results.rounds):
        for name in results.workloads:
            for scenario in draw.sample(results.scenarios, len(results.scenarios)):
                try:
                    results.samples.append(ask(scenario, WORKLOADS[name], number))
                except Unreadable as error:
                    results.failures.append(f"round {number + 1}: {error}")
                    say(results.failures[-1])
        results.write(path)
        say(f"round {number + 1} of {results.rounds}")
