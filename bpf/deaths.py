"""Seeing processes of pods die of signals: raw tracepoints, for as long as somebody traces."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bpf import syscalls
from bpf.compiler import DEATH_HOOKS, compile_deaths
from bpf.pins import Descriptor, Pins


@contextmanager
def deaths_told(pins: Pins) -> Iterator[None]:
    """Meanwhile there are events of them too. Raises CompileFailed or KernelRefused where the kernel can't."""
    with ExitStack() as open_:
        with tempfile.TemporaryDirectory(prefix="trace-", dir=pins.top) as scratch:
            compile_deaths(pins.maps, Path(scratch))
            for hook, tracepoint in DEATH_HOOKS.items():
                path = Path(scratch) / hook.name
                with Descriptor(syscalls.open_pin(path)) as program:
                    open_.callback(os.close, syscalls.open_raw_tracepoint(tracepoint, program.fd))
                path.unlink()
        yield
