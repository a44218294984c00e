"""The cgroups where the agent keeps the programs attached: those chosen at its start, and those where pods turn up."""

import threading
from dataclasses import replace
from pathlib import Path

import structlog

from bpf.attachment import Outcome, places_of
from bpf.covering import attach_where_pods_are, cover, is_covered
from bpf.errors import KernelRefused
from bpf.kernel import cgroup2_root
from bpf.retained import Retained
from bpf.trees import Choice
from installer.settings import Attachment

log = structlog.get_logger("places")


class Places:
    """Where the programs are attached while the agent runs. Safe to use from many threads."""

    def __init__(self, attachment: Attachment, retained: Retained | None = None) -> None:
        """The programs are attached already. `retained` has their links open, and will have those of new places."""
        self._attachment = attachment
        self._retained = retained
        self._lock = threading.Lock()
        self._known = places_of(attachment.pins)

    def every(self) -> list[Path]:
        """The cgroups that are there, the first place before the others."""
        return [place for place in self._known if place.is_dir()]

    def are_lost(self) -> bool:
        """Whether the programs do not decide at one of these cgroups any more."""
        root = cgroup2_root()
        return not all(is_covered(self._attachment.pins, root, place) for place in self.every())

    def attach(self) -> Outcome:
        """Attach again at these cgroups, and where pods are now. Raises what attach_programs() raises."""
        outcome = attach_where_pods_are(self._attachment.pins, self._choice())
        self._look()
        return outcome

    def cover(self, cgroup: Path) -> bool:
        """Attach where the pod is whose processes are in `cgroup`, unless it is covered. True if that took something.

        Raises KernelRefused that says why nothing can be attached there; NotAttached.
        """
        pins, given = self._attachment.pins, self._attachment.cgroup
        if given and not is_covered(pins, cgroup2_root(), cgroup):
            raise KernelRefused(f"--cgroup says {given}; give a cgroup above both, or leave the setting out")
        if not cover(pins, cgroup):
            return False
        self._look()
        log.warning("programs.extended", cgroups=" ".join(map(str, self.every())), reason=f"a pod is in {cgroup}")
        return True

    def _choice(self) -> Choice:
        """Where the settings say, else where the programs have been, then where pods are."""
        choice = self._attachment.choice()
        before = [] if choice.is_given else self.every()
        first, *further = dict.fromkeys((*before, *choice.every, *self.every()))
        return replace(choice, first=first, further=tuple(further))

    def _look(self) -> None:
        with self._lock:
            self._known = places_of(self._attachment.pins)
            if self._retained:
                self._retained.look()
