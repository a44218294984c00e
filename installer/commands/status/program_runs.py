"""The attached programs: in how many places each runs, and how often it has run if the kernel counts runs."""

import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bpf import syscalls
from bpf.errors import KernelRefused
from bpf.hooks import HOOKS, LOOKUP_HOOK, MESSAGE_HOOK, NETNS_HOOK, Hook
from bpf.links import instances
from bpf.pins import Pins
from bpf.places import link_directories
from bpf.steering import leads_to_lookup
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
    runs, nanoseconds = _runs(pins, hook, more)
    memory = more.get("memlock", "")
    return {
        "hook": hook.name,
        "id": info.id,
        "tag": bytes(info.tag).hex(),
        "loaded_at": _as_time(info.load_time),
        "bytes": int(memory) if memory.isdecimal() else None,
        "runs": runs if counting else None,
        "run_seconds": nanoseconds / 1e9 if counting and nanoseconds is not None else None,
        "attached": _attachments(pins, hook, info.id),
    }


def _runs(pins: Pins, hook: Hook, told: dict[str, str]) -> tuple[int | None, int | None]:
    """How often a program has run and for how many ns, of which the kernel has `told`; None where it does not say.

    Of steering it is the pods' instances that run, and their counts go with them. sk_lookup runs as a part of them.
    """
    if hook not in (NETNS_HOOK, LOOKUP_HOOK):
        return _number(told, "run_cnt"), _number(told, "run_time_ns")
    every = [_said_of(number) for number, _ in instances(pins)]
    runs, nanoseconds = (sum(_number(each, name) or 0 for each in every) for name in ("run_cnt", "run_time_ns"))
    return runs, nanoseconds


def _number(told: dict[str, str], name: str) -> int | None:
    return int(told[name]) if told.get(name, "").isdecimal() else None


def _said_of(program_id: int) -> dict[str, str]:
    """kernel_says() of a program by its id; nothing of one that has gone meanwhile."""
    with suppress(KernelRefused), Descriptor(syscalls.open_program_id(program_id)) as program:
        return kernel_says(program.fd)
    return {}


def _attachments(pins: Pins, hook: Hook, program_id: int) -> int:
    """In how many places the program runs: its cgroups, one map or, for steering, every pod's namespace."""
    if hook == MESSAGE_HOOK:
        path = pins.maps / "accelerated"
        with suppress(KernelRefused), Descriptor(syscalls.open_pin(path, syscalls.READ_ONLY)) as sockets:
            return attached_to(sockets.fd, hook.attach_type).programs.count(program_id)
        return 0
    if hook == LOOKUP_HOOK:
        return int(leads_to_lookup(pins))
    if hook == NETNS_HOOK:
        return sum(is_current for _, is_current in instances(pins))
    return sum(_is_at(directory / hook.name, program_id) for directory in link_directories(pins))


def _is_at(link: Path, program_id: int) -> bool:
    """Whether a pinned link attaches this program to a cgroup that is there."""
    with suppress(KernelRefused), Descriptor(syscalls.open_pin(link)) as opened:
        info = syscalls.link_info(opened.fd)
        return bool(info.prog_id == program_id and info.cgroup_id)
    return False


def _as_time(since_boot: int) -> str:
    """The UTC time of a moment that the kernel gives in nanoseconds since boot."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return datetime.fromtimestamp(booted + since_boot / 1e9, UTC).isoformat(timespec="seconds")
