"""Scenarios on several clusters at a time: whichever has ended one takes the next."""

from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from tests.cluster.bed import Bed
from tests.cluster.scenario import Scenario, run

Place = TypeVar("Place")


def run_on(places: Sequence[Place], scenarios: Iterable[Scenario], bring_up: Callable[[Place], Bed]) -> tuple[int, int]:
    """How many checks were as expected, of how many. What `bring_up` raises of one place ends the whole."""
    waiting: SimpleQueue[Scenario] = SimpleQueue()
    for each in scenarios:
        waiting.put(each)
    count = waiting.qsize()
    ended: SimpleQueue[tuple[int, int] | Exception] = SimpleQueue()
    for place in places:
        # nobody waits for a thread whose cluster is taken down beneath it
        Thread(target=_work, args=(place, bring_up, waiting, ended), daemon=True).start()
    good = of = 0
    for _ in range(count):
        found = ended.get()
        if isinstance(found, Exception):
            raise found
        good, of = good + found[0], of + found[1]
    return good, of


def _work(
    place: Place,
    bring_up: Callable[[Place], Bed],
    waiting: SimpleQueue[Scenario],
    ended: SimpleQueue[tuple[int, int] | Exception],
) -> None:
    try:
        bed = bring_up(place)
        while True:
            ended.put(run(waiting.get_nowait(), bed))
    except Empty:
        return
    except Exception as error:  # the thread that waits raises it
        ended.put(error)
