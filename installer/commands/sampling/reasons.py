"""Why connections failed and why messages were not redirected, in words for an operator."""

from installer.commands.sampling.sample import Kind

# direction and verdict (layout.TOTALS) → what happened, and what to do
FAILURES: dict[Kind, tuple[str, str]] = {
    ("inbound", "refused"): (
        "inbound: captured, but no proxy listens on port 15006",
        "Find out why the pod's istio-proxy is not ready, or in ambient mode why ztunnel does not have the pod "
        "(`sidestep status` says it). Ports that are not captured still answer.",
    ),
    ("outbound", "refused"): (
        "outbound: with the proxy's user or group, or with ztunnel's mark, before its container is known",
        "This ends as soon as the agent knows the container. If it goes on, check that the agent runs.",
    ),
    ("outbound", "denied"): (
        "outbound: to a port that the pod denies",
        "The pod's annotation sidestep.io/deny-outbound-ports says so.",
    ),
    ("inbound", "denied"): (
        "inbound: to a port that the pod denies",
        "The pod's annotation sidestep.io/deny-inbound-ports says so.",
    ),
}

# field of struct traffic → title and explanation
CAUSES = {
    "redirected": ("Redirected", "from socket to socket, past TCP"),
    "undrained": ("Undrained", "passed to TCP: TCP still had bytes under way, which must come first"),
    "over_budget": ("Over budget", "passed to TCP: the receiver is behind, or messages are small and many"),
    "no_peer": ("No peer", "passed to TCP: the other end is not in the map"),
}


def of_failure(kind: Kind) -> tuple[str, str]:
    """What happened and what to do. A kind that is not listed is only named."""
    return FAILURES.get(kind, (f"{kind[0]}: {kind[1]}", ""))
