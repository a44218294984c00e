"""Killed while it takes the programs down: the next start attaches them again, the next uninstall finishes."""

import os
import signal
from collections.abc import Callable
from typing import Any

from bpf.attachment import attach, detach, is_attached
from bpf.pins import Pins
from tests.datapath.conftest import scratch_pins


def killed_before_removal(pins: Pins, number: int) -> bool:
    """Detach in a child that dies before it removes the n-th thing; whether it did."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal count
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return real(*args, **options)

            return call

        os.unlink, os.rmdir = dying(os.unlink), dying(os.rmdir)
        try:
            detach(pins)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_the_next_start_attaches_again() -> None:
    with scratch_pins() as (pins, cgroup):
        # a link, more links, programs, maps: each start after the first has to compile
        for number in (0, 3, 12, 25, 45):
            attach(pins, cgroup)
            assert is_attached(pins)
            assert killed_before_removal(pins, number), f"there are no {number} things to remove"
        attach(pins, cgroup)
        assert is_attached(pins)


def test_the_next_uninstall_finishes() -> None:
    with scratch_pins() as (pins, cgroup):
        attach(pins, cgroup)
        number = 0
        while killed_before_removal(pins, number := number + 3):
            assert pins.top.exists()
        assert not pins.top.exists()
        assert not detach(pins)
