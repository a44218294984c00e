"""The pods that plugin and agent let pass when they were made. Only a running agent remembers them."""

from collections.abc import Iterable
from dataclasses import dataclass

from cni.enrolment.entries import Identity
from installer.commands.agent_socket import ask_about
from installer.settings import Node

_TITLE = "let pass when they were made, so not captured"


@dataclass(frozen=True)
class LetPast:
    """The reason of each pod by its name. If they are not known: `unknown` says why."""

    reasons: dict[str, str]
    unknown: str = ""

    def lines(self, told: Iterable[str]) -> list[str]:
        """The pods by reason, for people, without those that they are `told` of already."""
        if self.unknown:
            return [f"{_TITLE}: not known: {self.unknown}"]
        by_reason: dict[str, list[str]] = {}
        for pod in sorted(self.reasons.keys() - set(told)):
            by_reason.setdefault(self.reasons[pod], []).append(pod)
        count = sum(map(len, by_reason.values()))
        lines = [f"  {reason}: {', '.join(pods)}" for reason, pods in by_reason.items()]
        return [f"{_TITLE}, since the agent started: {count}", *lines] if lines else []

    def why(self, name: str) -> str:
        """Why the pod called NAME or NAMESPACE/NAME was let pass, as a sentence; "" if none of this name was."""
        fitting = (pod for pod in self.reasons if name in (pod, pod.partition("/")[2]))
        return next((f"{pod} is not captured: {self.reasons[pod]}" for pod in fitting), "")


def let_past(enrolled: Iterable[Identity], node: Node) -> LetPast:
    """Ask the agent. Pods that are enrolled by now are left out."""
    told = ask_about(node.cni_agent_run_dir, "WHO_PASSED")
    names = {str(each) for each in enrolled}
    return LetPast({each["pod"]: each["reason"] for each in told.rows if each["pod"] not in names}, told.unknown)
