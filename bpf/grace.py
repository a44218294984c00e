"""Waits until the programs are through that run now, so that what only they still look at can be removed.

Programs run in read-side sections of RCU. membarrier(2) waits for the end of all that have begun.
"""

import ctypes
import os
import platform

# asm/unistd.h
_MEMBARRIER = {"x86_64": 324, "aarch64": 283}
# uapi/linux/membarrier.h: the kernel calls synchronize_rcu(), unless there is one processor, or nohz_full (EINVAL)
_GLOBAL = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def wait_for_programs() -> bool:
    """Wait, about 20 ms, for the programs that run now. False if this kernel or machine has no way to tell."""
    number = _MEMBARRIER.get(platform.machine())
    if number is None or os.sysconf("SC_NPROCESSORS_ONLN") < 2:
        return False
    return int(_LIBC.syscall(number, _GLOBAL, 0, 0)) == 0
