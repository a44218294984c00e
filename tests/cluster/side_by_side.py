"""Scenarios on several clusters at a time: whichever has ended one takes the next."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
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
    found = [_of(ended.get()) for _ in range(count)]
    return sum(good for good, _ in found), sum(of for _, of in found)


def _of(told: tuple[int, int] | Exception) -> tuple[int, int]:
    """What a thread has told. Raises what ended it."""
    if isinstance(told, Exception):
        raise told
    return told


def _work(
    place: Place,
    bring_up: Callable[[Place], Bed],
    waiting: SimpleQueue[Scenario],
    ended: SimpleQueue[tuple[int, int] | Exception],
) -> None:
    try:
        bed = bring_up(place)
        with suppress(Empty):
            while True:
                ended.put(run(waiting.get_nowait(), bed))
    except Exception as error:  # the thread that waits raises it
        ended.put(error)
