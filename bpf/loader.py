"""The child process of loading.py: loads the programs from kept bytecode, or else from what the compiler makes now.

Both ways go through the same bytecode, so kept and fresh code differ in nothing. If the kernel refuses kept code, the
sources are compiled afresh: a kernel is called unfit only for what was compiled now.

`python -m bpf.loader WHAT MAPS PROGRAMS` writes its answer to standard output as JSON: the result, and what belongs in
the log.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bpf import compiler, kept, syscalls
from bpf.bytecode import Bytecode, Unreadable
from bpf.compiler import DEATH_SOURCES, SOURCES
from bpf.errors import CompileFailed, KernelRefused
from bpf.extras import ACCELERATION, EXTRAS, Extra, combinations, lacking
from bpf.hooks import DEATH_HOOKS, HOOKS, NETNS_HOOK, Hook, IteratorHook
from bpf.offsets import TASKS, definitions
from bpf.steering import keep
from bpf.syscalls import Descriptor, Log

NO_BCC = 3  # exit status
NOT_PERMITTED = os.strerror(errno.EPERM)
_NOT_LOADED = "the kernel does not load its program"
# libbcc's line about a map that the kernel refuses
_MAP_REFUSED = re.compile(r"could not open bpf map: (\w+), error: (.+)")
# lines of a verifier's log that begin with these words are not the reason
_VERIFIER_STATISTICS = ("processed ", "verification time ", "stack depth ", "HINT: ")


@dataclass(frozen=True)
class Refused:
    """The maps and programs that a kernel refuses: name → reason.

    The reason is NOT_PERMITTED if the kernel refuses because this process lacks a permission.
    """

    maps: dict[str, str]  # if a map is refused, no program is tried
    programs: dict[str, str]  # by name of the hook; the reason is the verifier's last line
    lacking: dict[str, str] = field(default_factory=dict)  # the extras that it does not have


@dataclass(frozen=True)
class _Unit:
    """What there is bytecode of: sources with their macros, and the hooks whose programs are in them."""

    sources: tuple[str, ...]
    macros: str
    hooks: tuple[Hook, ...]
    told: dict[str, str]  # to the log: why something was not as expected → event

    @classmethod
    def of(cls, extras: Iterable[Extra], told: dict[str, str]) -> "_Unit":
        """The programs that capture, with these extras."""
        taken = tuple(extras)
        hooks = (*HOOKS, *(extra.hook for extra in taken if extra.hook))
        return cls(SOURCES, "".join(extra.macros() for extra in taken), hooks, told)

    @cached_property
    def name(self) -> str:
        """Under which its bytecode is kept."""
        return compiler.name_of_bytecode(self.sources, self.macros, self.hooks)

    def kept(self) -> Bytecode | None:
        """The bytecode that is kept, None if there is none to be relied on."""
        try:
            packed = kept.find(kept.directory(), self.name)
            found = Bytecode.unpacked(packed) if packed else None
        except kept.NotBelieved as error:
            self.told[str(error)] = "bytecode.ignored"
            return None
        except Unreadable as error:
            self.told[f"{kept.directory() / self.name}: {error}"] = "bytecode.ignored"
            return None
        return found if found and compiler.is_compiler(found.compiler) else None

    def compiled(self) -> Bytecode:
        """Fresh bytecode, which is kept from now on. Raises CompileFailed, ImportError."""
        made = compiler.compiled(self.sources, self.macros, self.hooks)
        try:
            kept.keep(kept.directory(), self.name, made.packed())
        except kept.NotBelieved as error:
            self.told.setdefault(str(error), "bytecode.not_kept")
        except OSError as error:
            self.told[f"{error.filename or kept.directory()}: {error.strerror}"] = "bytecode.not_kept"
        return made


class _Loader:
    """Loads bytecode with the maps that are pinned in a directory. Descriptors are open as long as `open_` is.

    Maps that are not there are made, and pinned by pin_maps() alone: a refused program leaves none behind.
    """

    def __init__(self, bytecode: Bytecode, pinned: Path, open_: ExitStack) -> None:
        self._bytecode, self._pinned, self._open_ = bytecode, pinned, open_
        self._maps: dict[str, int] = {}
        self._fresh: list[str] = []

    def open_map(self, name: str) -> int:
        """A descriptor of the map. Raises KernelRefused."""
        if name not in self._maps:
            if (self._pinned / name).exists():
                opened = syscalls.open_pin(self._pinned / name)
            else:
                opened = syscalls.create_map(name, self._bytecode.maps[name], self._types)
                self._fresh.append(name)
            self._maps[name] = self._held(opened)
        return self._maps[name]

    def pin_maps(self) -> None:
        """Pin the maps that were made. Raises KernelRefused."""
        for name in self._fresh:
            syscalls.pin(self._maps[name], self._pinned / name)

    def load(self, hook: Hook, log: Log | None = None) -> int:
        """A descriptor of the program, loaded with the maps that it uses. Raises KernelRefused."""
        program = self._bytecode.programs[hook.name]
        target = syscalls.iterator_target(hook.target, hook.attach_type) if isinstance(hook, IteratorHook) else 0
        maps = [self.open_map(name) for name in program.maps]
        kind = hook.program_type, hook.attach_type
        return self._held(syscalls.load_program(hook.function, *kind, program.code, maps, target, log))

    def keep_steering(self) -> None:
        """Keep the code of which each pod gets an instance. Raises KernelRefused, CompileFailed."""
        keep(self.open_map("steering"), self._bytecode.programs[NETNS_HOOK.name])

    @cached_property
    def _types(self) -> int:
        return self._held(syscalls.load_types(self._bytecode.types))

    def _held(self, fd: int) -> int:
        return self._open_.enter_context(Descriptor(fd)).fd


_Told = dict[str, str]
_Loaded = dict[Hook, int]  # a descriptor of each hook's program


def _main_all(told: _Told, maps: Path, programs: Path) -> list[str]:
    without = lacking()
    with ExitStack() as open_:
        loader, loaded, extras = _loaded_best(without, maps, open_, told)
        for hook, fd in loaded.items():
            syscalls.pin(fd, programs / hook.name)
        for extra in extras:
            if extra.hook:
                try:
                    syscalls.pin(loader.load(extra.hook), programs / extra.hook.name)
                except KernelRefused:
                    without[extra.name] = _NOT_LOADED
        loader.keep_steering()  # last: from here on pods are enrolled with it
    taken = [extra.name for extra in extras if extra.name not in without]
    return [extra.name for extra in EXTRAS if extra.name not in taken]


def _loaded_best(
    without: Mapping[str, str], maps: Path, open_: ExitStack, told: _Told
) -> tuple[_Loader, _Loaded, tuple[Extra, ...]]:
    """The programs that capture, with as many extras as this kernel takes, and these extras."""
    *better, plainest = combinations(without)
    for extras in better:
        with suppress(CompileFailed, KernelRefused):
            return *_loaded(_Unit.of(extras, told), HOOKS, maps, open_), extras
    return *_loaded(_Unit.of(plainest, told), HOOKS, maps, open_), plainest


def _loaded(unit: _Unit, hooks: Collection[Hook], maps: Path, open_: ExitStack) -> tuple[_Loader, _Loaded]:
    """The programs of these hooks, from kept bytecode if the kernel takes it. Raises CompileFailed, KernelRefused."""
    if code := unit.kept():
        try:
            return _loaded_from(code, hooks, maps, open_)
        except KernelRefused as error:
            unit.told[str(error)] = "bytecode.refused"
    return _loaded_from(unit.compiled(), hooks, maps, open_)


def _loaded_from(code: Bytecode, hooks: Collection[Hook], maps: Path, open_: ExitStack) -> tuple[_Loader, _Loaded]:
    loader = _Loader(code, maps, open_)
    for name in code.maps:  # those too that no program uses
        loader.open_map(name)
    log = Log()
    try:
        loaded = {hook: loader.load(hook, log) for hook in hooks}
    except KernelRefused:
        sys.stderr.write("\n".join(["", *log.lines, ""]))
        raise
    loader.pin_maps()
    return loader, loaded


def _main_deaths(told: _Told, maps: Path, programs: Path) -> None:
    unit = _Unit(DEATH_SOURCES, definitions(TASKS), tuple(DEATH_HOOKS), told)
    with ExitStack() as open_:
        _, loaded = _loaded(unit, unit.hooks, maps, open_)
        for hook, fd in loaded.items():
            syscalls.pin(fd, programs / hook.name)


def _main_each(told: _Told, maps: Path) -> dict[str, dict[str, str]]:
    without = lacking()
    there = [extra for extra in EXTRAS if extra.name not in without and extra is not ACCELERATION]
    unit = _Unit.of(there, told)
    code = unit.kept()
    refused = _tried(code, there, maps) if code else None
    if refused is None or refused.maps or refused.programs:
        refused = _tried_afresh(unit, there, maps)
    return {"maps": refused.maps, "programs": refused.programs, "lacking": without | refused.lacking}


def _tried_afresh(unit: _Unit, extras: Iterable[Extra], maps: Path) -> Refused:
    try:
        with _overheard() as said:
            code = unit.compiled()
    except CompileFailed:
        sys.stderr.write("\n".join(said) + "\n")
        if refused := {found[1]: found[2] for line in said if (found := _MAP_REFUSED.search(line))}:
            return Refused(refused, {})
        raise
    return _tried(code, extras, maps)


def _tried(code: Bytecode, extras: Iterable[Extra], maps: Path) -> Refused:
    with ExitStack() as open_:
        loader = _Loader(code, maps, open_)
        for name in code.maps:
            try:
                loader.open_map(name)
            except KernelRefused as error:
                return Refused({name: os.strerror(error.errno)}, {})
        refused = {hook.name: why for hook in HOOKS if (why := _refusal(loader, hook))}
        wanted = {extra.name: extra.hook for extra in extras if extra.hook}
        lost = {name: why for name, hook in wanted.items() if (why := _refusal(loader, hook))}
        if not refused:
            loader.pin_maps()
        return Refused({}, refused, lost)


def _refusal(loader: _Loader, hook: Hook) -> str:
    """Why the kernel does not load a program, "" if it does."""
    log = Log()
    try:
        loader.load(hook, log)
    except KernelRefused as error:
        words = os.strerror(error.errno)
        return words if error.errno == errno.EPERM else _verifiers_last_line(log.lines, words)
    return ""


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """Collect the lines that are written to stderr in the with block; libbcc reports errors nowhere else.

    The list is filled when the block ends.
    """
    lines: list[str] = []
    own = os.dup(2)
    with open(os.memfd_create("stderr"), "w+", errors="replace") as heard:  # noqa: PTH123
        os.dup2(heard.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(own, 2)
            os.close(own)
            heard.seek(0)
            lines += heard.read().splitlines()


def _verifiers_last_line(log: list[str], otherwise: str) -> str:
    lines = [line for line in log if line.strip() and not line.startswith(_VERIFIER_STATISTICS)]
    return lines[-1] if lines else otherwise


if __name__ == "__main__":
    try:
        mains: dict[str, Callable[..., object]] = {"all": _main_all, "each": _main_each, "deaths": _main_deaths}
        told: _Told = {}
        answer = mains[sys.argv[1]](told, *map(Path, sys.argv[2:]))
        sys.stdout.write(json.dumps([answer, told]))
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(NO_BCC)
    except Exception as error:  # its words are for the parent; compiler and verifier have written theirs
        sys.exit(str(error))
