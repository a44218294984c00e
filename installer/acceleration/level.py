"""The level in force on this node: the level asked for, lowered to what the self-test and other programs allow."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from bpf.acceleration import NodeLevel, is_possible, level_of, other_owners, set_level
from bpf.errors import SidestepError
from bpf.layout import Level
from bpf.pins import Pins
from bpf.tables import Tables
from installer.acceleration.checks import CHECKS
from installer.acceleration.selftest import SelfTest, kept_outcome, outcome

log = structlog.get_logger("acceleration")

# how often to look for other owners of socket maps: they come with node agents, not with pods
_LOOK_SECONDS = 60.0
# how often to look again after finding one, or after a failure
_LOOK_AGAIN_SECONDS = 10.0
# how long stopping waits for a self-test; its child process ends by itself
_STOP_SECONDS = 3.0
# pause before a failed self-test is repeated: the first, and the longest, as it may never succeed on this kernel
_RETRY_SECONDS, _RETRY_SECONDS_LIMIT = 10.0, 1800.0


def judge(wanted: Level, found: SelfTest, others: list[str], before: Level = Level.OFF) -> NodeLevel:
    """Lower a level to what the self-test and other owners of socket maps allow.

    `before` is the level in force so far. It stays in force while a self-test is postponed.
    """
    if wanted is Level.OFF:
        return NodeLevel(wanted, Level.OFF, "")
    if others:
        return NodeLevel(wanted, Level.OFF, f"another program on this node owns sockets: {'; '.join(others)}")
    if found.postponed:
        level = min(wanted, before)
        return NodeLevel(wanted, level, "" if level is wanted else f"not tried yet: {found.postponed}")
    if found.failure:
        return NodeLevel(wanted, Level.OFF, found.failure)
    for level in (Level.PROXY, Level.FULL):
        missed = _missed(found.problems, level)
        if missed and wanted >= level:
            return NodeLevel(wanted, Level(level - 1), f"level {level} is not safe on this kernel: {missed}")
    unseen = "; ".join(f"{name}: {why}" for name, why in found.unseen.items())
    differs = _missed(found.problems, Level.OFF) if wanted is Level.FULL else ""
    notes = (
        unseen and f"not looked at: {unseen}",
        differs and f"on this kernel applications see a difference: {differs}",
    )
    return NodeLevel(wanted, wanted, "; ".join(filter(None, notes)))


def _missed(problems: Mapping[str, str], level: Level) -> str:
    """The checks that a level needs and that failed or did not run, as text; empty if there are none."""
    said = {check.name: problems.get(check.name, "not tried") for check in CHECKS if check.needed is level}
    return "; ".join(f"{name}: {problem}" for name, problem in said.items() if problem)


class Stopping(SidestepError):
    """The agent stops, so it must not change the node's level any more."""


class LevelKeeper:
    """Keeps a node at the level asked for, or at the highest level below it that is safe."""

    def __init__(self, pins: Pins, tables: Tables, cgroup: Path, run_dir: Path) -> None:
        self._pins, self._tables, self._cgroup, self._run_dir = pins, tables, cgroup, run_dir
        self._stopping = threading.Event()
        self._outcome: SelfTest | None = None
        self._again_at = 0.0  # time.monotonic()
        self._pause = _RETRY_SECONDS

    def settle(self, wanted: Level) -> NodeLevel:
        """Put the highest safe level in force. The first call on a kernel runs the self-test: a second or two.

        Raises SidestepError, OSError.
        """
        asked_before = level_of(self._tables).wanted
        found = SelfTest({}) if wanted is Level.OFF else self._known()
        if self._stopping.is_set():  # stopping does not wait for the self-test: the tables may be closed by now
            raise Stopping("the agent ends")
        before = level_of(self._tables)
        if before.wanted is not asked_before:  # an operator changed it while the self-test was running
            wanted = before.wanted
        if wanted is not Level.OFF and found.is_good and not is_possible(self._pins):
            found = SelfTest({}, "the kernel refused the program when it was attached")
        node = judge(wanted, found, list(other_owners(self._pins)), before.level)
        if node != before:
            set_level(self._tables, node)
        return node

    def _known(self) -> SelfTest:
        """The self-test's result, from this or another process. A failed one is repeated after growing pauses."""
        if self._outcome and not self._outcome.is_good:
            self._outcome = kept_outcome(self._run_dir) or self._outcome
        if self._outcome and (self._outcome.is_good or time.monotonic() < self._again_at):
            return self._outcome
        self._outcome = outcome(self._cgroup, self._run_dir)
        self._again_at = time.monotonic() + self._pause
        if not self._outcome.postponed:
            self._pause = min(2 * self._pause, _RETRY_SECONDS_LIMIT)
        return self._outcome

    @contextmanager
    def running(self, wanted: Level) -> Iterator[None]:
        """Settle now and from time to time in a separate thread, so that nothing waits for the self-test."""
        thread = threading.Thread(target=self._run, args=(wanted,), name="acceleration", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join(_STOP_SECONDS)

    def _run(self, wanted: Level) -> None:
        told = None
        while not self._stopping.is_set():
            try:
                node = self.settle(wanted)
            except Stopping:
                return
            except (SidestepError, OSError) as error:  # the next round may succeed
                log.error("acceleration.failed", error=str(error))
            else:
                if node != told:
                    log.info("acceleration.settled", at=str(node.level), wanted=str(node.wanted), reason=node.reason)
                told = node
            self._stopping.wait(_LOOK_SECONDS if told and told.level == told.wanted else _LOOK_AGAIN_SECONDS)
            with suppress(SidestepError, OSError):
                wanted = level_of(self._tables).wanted if told else wanted  # an operator may have changed it
