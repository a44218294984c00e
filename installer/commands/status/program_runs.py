"""The attached programs: in how many places each runs, and how often it has run if the kernel counts runs."""

import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bpf import syscalls
from bpf.compiler import HOOKS, MESSAGE_HOOK, NETNS_HOOK, Hook
from bpf.errors import KernelRefused
from bpf.pins import Pins
from bpf.syscalls import Descriptor, attached_to
from installer.commands.maps.listing import kernel_says

_STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
# turns the counts on; that costs every BPF program of the machine a little, so the operator decides
HOW_TO_COUNT = "sysctl kernel.bpf_stats_enabled=1"


def counts_runs() -> bool:
    """Whether the kernel counts and times the runs of BPF programs."""
    try:
        return _STATISTICS.read_text().strip() == "1"
    except OSError:
        return False


def programs_of(pins: Pins) -> list[dict[str, Any]]:
    """Every program in the order of the hooks. Without a pin it has no id. Times are UTC, run times seconds."""
    counting = counts_runs()
    hooks = (*HOOKS, *((MESSAGE_HOOK,) if (pins.programs / MESSAGE_HOOK.name).exists() else ()))
    return [_program(pins, hook, counting) for hook in hooks]


def _program(pins: Pins, hook: Hook, counting: bool) -> dict[str, Any]:
    try:
        opened = Descriptor(syscalls.open_pin(pins.programs / hook.name, syscalls.READ_ONLY))
    except KernelRefused:
        blank = dict.fromkeys(("id", "tag", "loaded_at", "bytes", "runs", "run_seconds"))
        return {"hook": hook.name, **blank, "attached": 0}
    with opened as program:
        info, more = syscalls.program_info(program.fd), kernel_says(program.fd)
    memory = more.get("memlock", "")
    return {
        "hook": hook.name,
        "id": info.id,
        "tag": bytes(info.tag).hex(),
        "loaded_at": _as_time(info.load_time),
        "bytes": int(memory) if memory.isdecimal() else None,
        "runs": int(more["run_cnt"]) if counting and "run_cnt" in more else None,
        "run_seconds": int(more["run_time_ns"]) / 1e9 if counting and "run_time_ns" in more else None,
        "attached": _attachments(pins, hook, info.id),
    }


def _attachments(pins: Pins, hook: Hook, program_id: int) -> int:
    """In how many places the program runs: one cgroup, one socket hash or, for steering, every pod's namespace."""
    if hook == MESSAGE_HOOK:
        path = pins.maps / "accelerated"
        with suppress(KernelRefused), Descriptor(syscalls.open_pin(path, syscalls.READ_ONLY)) as sockets:
            return attached_to(sockets.fd, hook.attach_type).programs.count(program_id)
        return 0
    links = pins.netns.iterdir() if hook == NETNS_HOOK else [pins.links / hook.name]
    return sum(_runs(path, program_id, hook == NETNS_HOOK) for path in links)


def _runs(link: Path, program_id: int, in_netns: bool) -> bool:
    """Whether a pinned link runs the program in a cgroup or namespace that still exists."""
    try:
        with Descriptor(syscalls.open_pin(link)) as opened:
            info = syscalls.link_info(opened.fd)
    except KernelRefused:
        return False
    return info.prog_id == program_id and bool(info.netns_inode if in_netns else info.cgroup_id)


def _as_time(since_boot: int) -> str:
    """The UTC time of a moment that the kernel gives in nanoseconds since boot."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return datetime.fromtimestamp(booted + since_boot / 1e9, UTC).isoformat(timespec="seconds")
