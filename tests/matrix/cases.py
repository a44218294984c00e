"""The cases of the matrix: every program by every way at every level, and what is expected of each."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bpf.layout import LEVELS
from tests.matrix.bed import CHANGING, Bed, Outcome, Result
from tests.matrix.software import SOFTWARE, Notice, Software, Way

_SECONDS = 60  # a case takes some seconds
_SECONDS_IF_IT_MAY_HANG = 20


@dataclass(frozen=True)
class Case:
    """One program by one way at one level."""

    software: Software
    way: Way
    level: str

    @property
    def name(self) -> str:
        """As it is shown and chosen."""
        return f"{self.software.name}/{self.way.label}/{self.level}"

    @property
    def notice(self) -> Notice | None:
        """What the program may notice, and the documentation says."""
        return self.software.at_full if self.level in ("full", CHANGING) else None

    @property
    def seconds(self) -> int:
        """How long it may take."""
        return _SECONDS_IF_IT_MAY_HANG if self.notice else _SECONDS

    @property
    def expected(self) -> set[Outcome]:
        """Where a program may hang it still never gets wrong bytes; but who splices misses some."""
        if self.notice is None:
            return {Outcome.RIGHT}
        if self.notice.always:
            return set(Outcome) - ({Outcome.RIGHT} if self.level == "full" else set())
        return {Outcome.RIGHT, Outcome.HUNG}

    def verdict(self, result: Result) -> str:
        """What is wrong with a result; empty if it is as expected."""
        if result.outcome not in self.expected:
            return result.said or "docs/acceleration.md says that it can't be"
        if self.level != CHANGING and (result.redirected > 0) != (self.level != "off"):
            return f"{result.redirected} bytes were redirected"
        if (result.handshakes > 0) != self.way.is_mutual:
            return f"the proxies made {result.handshakes} handshakes"
        return ""

    def line(self, result: Result) -> str:
        """One line of the output."""
        wrong = self.verdict(result)
        if wrong:
            return f"{self.name}: UNEXPECTED: {result.outcome}: {wrong}"
        if result.outcome is Outcome.RIGHT:
            share = f"{result.redirected / 1e6:.1f} MB in three hops past TCP"
            return f"{self.name}: right, {result.moved / 1e6:.1f} MB compared, {share}"
        assert self.notice
        return f"{self.name}: {result.outcome}, as docs/acceleration.md says: {self.notice.row}"


def cases(patterns: Iterable[str] = ()) -> list[Case]:
    """All, or those whose names fit one of the patterns."""
    # the highest level first: nothing that a server keeps of an earlier case can stand in its way
    made = [
        Case(software, way, level)
        for software in SOFTWARE.values()
        for way in software.ways
        for level in (*reversed(LEVELS), CHANGING)
    ]
    chosen = list(patterns)
    return [each for each in made if not chosen or any(fnmatchcase(each.name, pattern) for pattern in chosen)]


def run(bed: Bed, wanted: list[Case], seed: int, size: int) -> Iterator[tuple[Case, Result]]:
    """One after another; a server serves the cases that follow each other."""
    for group in _grouped(wanted, lambda case: (case.software.name, case.way)):
        with bed.serving(group[0].software, group[0].way):
            for case in group:
                with bed.at(case.level):
                    result = bed.call(case.software, case.way, seed, size, case.seconds)
                yield case, result


def _grouped(wanted: list[Case], key: Callable[[Case], object]) -> list[list[Case]]:
    groups: dict[object, list[Case]] = {}
    for case in wanted:
        groups.setdefault(key(case), []).append(case)
    return list(groups.values())
