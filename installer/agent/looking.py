"""Looks again and again in a thread of its own: for what keeps something small, or true, while the agent runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog


@contextmanager
def looking(name: str, look: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call `look` every so many seconds until the end. The log has each failure once, as NAME.failed."""
    stop = threading.Event()
    thread = threading.Thread(target=_run, args=(name, look, seconds, stop), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _run(name: str, look: Callable[[], object], seconds: float, stop: threading.Event) -> None:
    log, problem = structlog.get_logger(name), ""
    while not stop.wait(seconds):
        try:
            look()
            problem = ""
        except Exception as error:  # whatever it is, the next look may succeed
            if str(error) != problem:
                log.exception(f"{name}.failed")
            problem = str(error)
