"""The policies of the Pods of one node: what their annotations say, and the node's defaults where they say nothing."""

from dataclasses import dataclass

from cni.policy.annotations import CapturePolicy, OnUncaptured, policy_of
from cni.policy.pod import Pod


@dataclass(frozen=True)
class Policies:
    """The defaults that an operator has set for a node. Istio's annotations have Istio's defaults everywhere."""

    uncaptured: OnUncaptured = "allow"
    exempt_namespaces: tuple[str, ...] = ()  # where Pods that say nothing have "allow" all the same

    def of(self, pod: Pod) -> CapturePolicy:
        """The policy of a Pod on this node. Raises InvalidAnnotation as policy_of() does."""
        return policy_of(pod, "allow" if pod.namespace in self.exempt_namespaces else self.uncaptured)
