"""Waiting for what other processes do, with a limit and a name for what did not come."""

import time
from collections.abc import Callable

_SHORTEST, _LONGEST = 0.005, 0.1  # seconds between two looks, of which some start processes


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    """Look until `condition` holds, less often as time goes by. Raises TimeoutError naming `what`."""
    deadline, pause = time.monotonic() + seconds, _SHORTEST
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(pause)
        pause = min(pause * 1.2, _LONGEST)
