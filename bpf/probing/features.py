"""What this kernel can do of what the programs need: by loading and by watching them act, never by its version.

bpftool's feature probe reports helpers that do not load, and distributions backport; so every program type, helper and
map is tried. It takes some 50 ms: the programs are ready-made (trials.py), attached to a scratch cgroup and used by one
child process (scratch.py, exercise.py).
"""

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bpf import syscalls
from bpf.compiler import CGROUP_HOOKS, HOOKS, NETNS_HOOK, Hook
from bpf.errors import KernelRefused
from bpf.layout import Quad, Word
from bpf.probing import loading
from bpf.probing.exercise import Bench, Exercised, exercise_trials
from bpf.probing.scratch import in_child, scratch_cgroup
from bpf.probing.trials import Note, Trial, TrialTables, idle, trials
from bpf.syscalls import Descriptor

_EXERCISE_SECONDS = 20.0  # each of its steps gives up after one


class Presence(StrEnum):
    """Whether something needed is there."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"  # it could not be tried
    WARNING = "warning"  # capture works without


@dataclass(frozen=True)
class Feature:
    """One thing of the kernel's that was tried, and how it went."""

    name: str
    verdict: Presence
    found: str


# maps that are seen to hold an entry, with flags as maps.h has them; sockhash and sk_storage hold sockets and are
# exercised by the programs
_PLAIN_MAPS = {
    "hash": (loading.HASH, loading.NO_PREALLOC),
    "lru_hash": (loading.LRU_HASH, 0),
    "lpm_trie": (loading.LPM_TRIE, loading.NO_PREALLOC),
    "array": (loading.ARRAY, 0),
}
MAPS = (*_PLAIN_MAPS, "sockhash", "sk_storage")
# what is no single hook's
OTHERS = ("bpf_link", "SO_NETNS_COOKIE", "pidfd_getfd", "locked memory")


@dataclass
class _Tried:
    """How far the program of a hook got; a problem ends it."""

    hook: Hook
    program: int | None = None
    problem: Feature | None = None


def try_features(places: Sequence[Path]) -> list[Feature]:
    """Try MAPS, HOOKS and OTHERS, on a scratch cgroup below the first of `places` where one can be made and entered.

    Where there is none, programs and maps are loaded and nothing is seen to act, which is said of each.
    """
    with ExitStack() as undo:
        plain = [_plain_map(name, undo) for name in _PLAIN_MAPS]
        notes, _ = _made("notes", lambda: loading.create_map(loading.HASH, 4, 8, len(Note), 0, "ssp_notes"), undo)
        listeners, sockhash = _made(
            "sockhash", lambda: loading.create_map(loading.SOCKHASH, 4, 8, 8, 0, "ssp_listeners"), undo
        )
        storage, sk_storage = _made("sk_storage", lambda: loading.create_storage("ssp_storage"), undo)
        maps = [*plain, sockhash, sk_storage]
        if notes is None or listeners is None or storage is None:
            why = "not tried: a map that its trial needs is missing"
            return [*maps, *(Feature(name, Presence.UNKNOWN, why) for name in (*(h.name for h in HOOKS), *OTHERS))]
        tables = TrialTables(notes, storage, listeners)
        tried = [_load(trial, undo) for trial in trials(tables)]
        exercised, why = _exercise_somewhere(places, tables, tried)
        programs = [_program(each, exercised, why) for each in tried]
        return [*maps, *programs, *(_seen(name, "works", exercised, why) for name in OTHERS)]


def _made(name: str, make: Callable[[], int], undo: ExitStack) -> tuple[int | None, Feature]:
    """A descriptor that `undo` closes, and what to say of it."""
    try:
        fd = undo.enter_context(Descriptor(make())).fd
    except KernelRefused as error:
        return None, _refused(name, error)
    return fd, Feature(name, Presence.YES, "made")


def _plain_map(name: str, undo: ExitStack) -> Feature:
    kind, flags = _PLAIN_MAPS[name]
    # a trie's key starts with the prefix length, which here is all of the rest
    key: ctypes.Structure = Word(0) if name == "array" else Quad(32)
    fd, feature = _made(name, lambda: loading.create_map(kind, ctypes.sizeof(key), 8, 8, flags, f"ssp_{name}"), undo)
    if fd is None:
        return feature
    value = Quad()
    if number := syscalls.map_update(fd, key, Quad(1)):
        return _refused(name, syscalls.refused("bpf_map_update_elem", name, number))
    if not syscalls.map_lookup(fd, key, value) or value.quad != 1:
        return Feature(name, Presence.NO, "does not give back what was put in")
    return Feature(name, Presence.YES, "made, written, read")


def _refused(name: str, error: KernelRefused, what: str = "") -> Feature:
    """EPERM says something of this process, not of the kernel."""
    if error.errno == errno.EPERM:
        return Feature(name, Presence.UNKNOWN, "not permitted to try")
    return Feature(name, Presence.NO, f"{what}{error}")


def _load(trial: Trial, undo: ExitStack) -> _Tried:
    hook, label = trial.hook, f"ssp_{trial.hook.name}"
    try:
        fd = loading.load_program(hook.program_type, hook.attach_type, trial.program(), label)
    except KernelRefused as error:
        return _Tried(hook, problem=_refused(hook.name, error, _missing_parts(trial)))
    return _Tried(hook, undo.enter_context(Descriptor(fd)).fd)


def _missing_parts(trial: Trial) -> str:
    """Which helpers or fields the kernel refuses when they are alone, as the start of a sentence."""
    missing = []
    for name, program in trial.alone():
        try:
            hook = trial.hook
            with Descriptor(loading.load_program(hook.program_type, hook.attach_type, program, "ssp_part")):
                pass
        except KernelRefused:
            missing.append(name)
    return f"without {', '.join(missing)}: " if 0 < len(missing) < len(trial.parts) else ""


def _exercise_somewhere(
    places: Sequence[Path], tables: TrialTables, tried: list[_Tried]
) -> tuple[Exercised | None, str]:
    """What was seen, or None and why nothing could be."""
    why = "no cgroup2"
    for place in places:
        try:
            with scratch_cgroup(place) as cgroup, ExitStack() as undo:
                return _exercise(cgroup, tables, tried, undo), ""
        except OSError as error:
            why = f"no scratch cgroup in {place}: {error.strerror}"
        except KernelRefused as error:
            why = str(error)
    return None, why


def _exercise(cgroup: Path, tables: TrialTables, tried: list[_Tried], undo: ExitStack) -> Exercised:
    links: dict[str, int] = {}
    programs = {each.hook.name: each.program for each in tried}
    for each in tried:
        if each.program is None or each.hook == NETNS_HOOK:
            continue
        try:
            links[each.hook.name] = _link(each.program, cgroup, each.hook, undo)
        except KernelRefused as error:
            each.problem = Feature(each.hook.name, Presence.NO, f"loads, cannot be attached: {_why_no_link(error)}")
    quiet = _idle_beside(cgroup, undo) if "connect4" in links else None
    bench = Bench(cgroup, tables, frozenset(links), programs[NETNS_HOOK.name], links.get("connect4"), quiet)
    problems, ipv6 = in_child(lambda: exercise_trials(bench), _EXERCISE_SECONDS)
    return Exercised(problems, ipv6)


def _link(program: int, cgroup: Path, hook: Hook, undo: ExitStack) -> int:
    with Descriptor(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as directory:
        made = syscalls.create_link(program, directory.fd, hook.attach_type, cgroup.parent)
    return undo.enter_context(Descriptor(made)).fd


def _why_no_link(error: KernelRefused) -> str:
    """Whoever may load may attach, so a program of this cgroup or one above must forbid it (foreign.py tells which)."""
    return "another program is there exclusively" if error.errno == errno.EPERM else str(error)


def _idle_beside(cgroup: Path, undo: ExitStack) -> int:
    """A second program on a hook that has one, which must not be in its way."""
    hook = next(each for each in CGROUP_HOOKS if each.name == "connect4")
    fd = loading.load_program(hook.program_type, hook.attach_type, idle(), "ssp_idle")
    program = undo.enter_context(Descriptor(fd)).fd
    _link(program, cgroup, hook, undo)
    return program


def _program(tried: _Tried, exercised: Exercised | None, why: str) -> Feature:
    name = tried.hook.name
    if tried.problem:
        return tried.problem
    if exercised and not exercised.ipv6 and name.endswith("6"):
        return Feature(name, Presence.YES, "loads; IPv6 is off, so there is nothing to try")
    return _seen(name, "loads, acts", exercised, why)


def _seen(name: str, good: str, exercised: Exercised | None, why: str) -> Feature:
    if exercised is None or name not in exercised.problems:
        return Feature(name, Presence.UNKNOWN, f"not tried: {why or 'what it builds on is missing'}")
    problem = exercised.problems[name]
    return Feature(name, Presence.NO, f"does not act: {problem}") if problem else Feature(name, Presence.YES, good)
