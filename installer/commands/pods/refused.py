"""The pods that the agent refused, and when and why. Only a running agent knows them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from installer.commands.agent_socket import ask_about


@dataclass(frozen=True)
class Refused:
    """A document for each pod (Refusal.document()). If they are not known: `unknown` says why."""

    pods: tuple[dict[str, Any], ...]
    unknown: str = ""

    def of(self, namespace: str) -> "Refused":
        """Those of one namespace; of all if it is ""."""
        fitting = (each for each in self.pods if namespace in ("", each["pod"].partition("/")[0]))
        return Refused(tuple(fitting), self.unknown)

    def why(self, name: str) -> str:
        """Why the pod called NAME or NAMESPACE/NAME was refused, as a sentence; "" if none of this name was."""
        fitting = (each for each in self.pods if name in (each["pod"], each["pod"].partition("/")[2]))
        return next((f"{each['pod']} was refused at {each['at']}: {each['words']}" for each in fitting), "")

    def document(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"unknown": self.unknown, "refused": list(self.pods)}


def refused_pods(run_dir: Path, enrolled: Iterable[str] = ()) -> Refused:
    """Ask the agent that serves this directory. Pods that are `enrolled` by now (NAMESPACE/NAME) are left out."""
    told = ask_about(run_dir, "WHO_WAS_REFUSED")
    names = set(enrolled)
    return Refused(tuple(each for each in told.rows if each["pod"] not in names), told.unknown)


def refused_text(refused: Refused) -> str:
    """For people: a paragraph for each pod, as the words are long."""
    from installer.commands.printing import line, rendered

    if refused.unknown:
        return f"refused pods: not known: {refused.unknown}\n"
    if not refused.pods:
        return "no pod was refused since the agent started\n"
    lines = []
    for each in refused.pods:
        lines.append(line(f"{each['pod']}, last at {each['at']}, {_times(each['times'])}", hanging="  "))
        if each["annotation"]:
            lines.append(line(each["annotation"], "  annotation  ", " " * 14))
        lines.append(line(each["words"], "  refused     ", " " * 14))
    return rendered(*lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
