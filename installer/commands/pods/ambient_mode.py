"""The node's ambient mode, as its agent tells of it: the ztunnels, and which pods are in the mesh. Only it knows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from installer.commands.agent_socket import ask_about
from installer.commands.pods.pod_state import AMBIENT, PENDING


@dataclass(frozen=True)
class AmbientMode:
    """`is_on` is None if it is not known, and then `unknown` says why; `problem` says why no ztunnel takes pods."""

    is_on: bool | None = None
    unknown: str = ""
    ztunnels: int = 0
    problem: str = ""
    pods: tuple[dict[str, str], ...] = ()  # each with pod, uid, state, and reason ("": nothing has failed for it)

    def state_of(self, uid: str, state: str) -> str:
        """The state of an enrolled pod: that of the maps, unless the agent knows that ztunnel does not have it."""
        is_waiting = any(each["uid"] == uid and each["state"] == PENDING for each in self.pods)
        return PENDING if state == AMBIENT and is_waiting else state

    def reason_of(self, uid: str) -> str:
        """What has failed for a pod; "" if nothing has."""
        return next((each["reason"] for each in self.pods if each["uid"] == uid), "")

    def not_enrolled(self, enrolled: set[str]) -> list[dict[str, str]]:
        """The pods that should be in the mesh and are not even enrolled. `enrolled` has the UIDs of those that are."""
        return [each for each in self.pods if each["uid"] not in enrolled]

    def document(self, is_expected: bool) -> dict[str, Any]:
        """The same as plain values. `is_expected`: by the settings or the maps, there is ambient mode here."""
        return {**vars(self), "pods": list(self.pods), "is_expected": is_expected or bool(self.is_on)}


def ambient_mode(run_dir: Path) -> AmbientMode:
    """Ask the agent that serves this directory."""
    told = ask_about(run_dir, "WHO_IS_AMBIENT")
    if told.unknown:
        return AmbientMode(unknown=told.unknown)
    for each in told.rows:
        return AmbientMode(True, "", each["ztunnels"], each["problem"], tuple(each["pods"]))
    return AmbientMode(False)
