"""The policies of the Pods of one node: what their annotations say, and the node's defaults where they say nothing."""

from dataclasses import dataclass

from cni.policy import annotations
from cni.policy.annotations import CapturePolicy, OnUncaptured, followed_of, policy_of
from cni.policy.pod import Pod


@dataclass(frozen=True)
class Policies:
    """The defaults that an operator has set for a node. Istio's annotations have Istio's defaults everywhere."""

    uncaptured: OnUncaptured = "allow"
    exempt_namespaces: tuple[str, ...] = ()  # where Pods that say nothing have "allow" all the same
    live: bool = False  # whether running Pods that say nothing of it follow their annotations

    def of(self, pod: Pod) -> CapturePolicy:
        """The policy of a Pod on this node. Raises InvalidAnnotation as policy_of() does."""
        return policy_of(pod, self._on_uncaptured(pod), self.live)

    def of_enrolled(self, pod: Pod, uncaptured: OnUncaptured) -> CapturePolicy:
        """The policy of a Pod that is enrolled with `uncaptured`. Where it says nothing of that, it keeps it."""
        return policy_of(pod, uncaptured, self.live)

    def is_live(self, pod: Pod) -> bool:
        """Whether a Pod follows its annotations while it runs. Raises InvalidAnnotation."""
        return annotations.is_live(pod, self.live)

    def followed(self, pod: Pod) -> CapturePolicy:
        """What a running Pod follows now, as followed_of() has it. Raises InvalidAnnotation."""
        return followed_of(pod, self._on_uncaptured(pod), self.live)

    def _on_uncaptured(self, pod: Pod) -> OnUncaptured:
        return "allow" if pod.namespace in self.exempt_namespaces else self.uncaptured
