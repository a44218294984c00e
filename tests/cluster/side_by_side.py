"""Scenarios on several clusters at a time: whichever has ended one takes the next."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from tests.cluster.bed import Bed
from tests.cluster.scenario import Scenario, run

Place = TypeVar("Place")
Told = TypeVar("Told")


def run_on(places: Sequence[Place], scenarios: Iterable[Scenario], bring_up: Callable[[Place], Bed]) -> tuple[int, int]:
    """How many checks were as expected, of how many. What `bring_up` raises of one place ends the whole.

    Scenarios that must be alone come last, one after the other.
    """
    every = list(scenarios)
    alone = [each for each in every if each.is_alone]
    waiting: SimpleQueue[Scenario] = SimpleQueue()
    for each in every:
        if not each.is_alone:
            waiting.put(each)
    count = waiting.qsize()
    ended: SimpleQueue[tuple[int, int] | Exception] = SimpleQueue()
    idle: SimpleQueue[Bed | Exception] = SimpleQueue()
    for place in places:
        # nobody waits for a thread whose cluster is taken down beneath it
        Thread(target=_work, args=(place, bring_up, waiting, ended, idle), daemon=True).start()
    found = [_of(ended.get()) for _ in range(count)]
    if alone:
        bed = [_of(idle.get()) for _ in places][-1]
        found += [run(each, bed) for each in alone]
    return sum(good for good, _ in found), sum(of for _, of in found)


def _of(told: Told | Exception) -> Told:
    """What a thread has told. Raises what ended it."""
    if isinstance(told, Exception):
        raise told
    return told


def _work(
    place: Place,
    bring_up: Callable[[Place], Bed],
    waiting: SimpleQueue[Scenario],
    ended: SimpleQueue[tuple[int, int] | Exception],
    idle: SimpleQueue[Bed | Exception],
) -> None:
    try:
        bed = bring_up(place)
        with suppress(Empty):
            while True:
                ended.put(run(waiting.get_nowait(), bed))
        idle.put(bed)
    except Exception as error:  # the thread that waits raises it
        ended.put(error)
        idle.put(error)
