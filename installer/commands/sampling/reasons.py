"""Why connections did not come about and why messages were not redirected, in words for an operator."""

from installer.commands.sampling.sample import Kind

# by direction and verdict of layout.TOTALS: what it was, and what to do
FAILURES: dict[Kind, tuple[str, str]] = {
    ("inbound", "refused"): (
        "inbound: captured, but no proxy listens on port 15006",
        "See why the pod's istio-proxy is not ready. Uncaptured ports answer all the same.",
    ),
    ("outbound", "refused"): (
        "outbound: as the proxy, before its container is known",
        "It passes by itself as soon as the agent knows the container; if it goes on, see that the agent runs.",
    ),
    ("outbound", "denied"): (
        "outbound: to a port that the pod denies",
        "By the pod's annotation sidestep.io/deny-outbound-ports.",
    ),
    ("inbound", "denied"): (
        "inbound: to a port that the pod denies",
        "By the pod's annotation sidestep.io/deny-inbound-ports.",
    ),
}

# by the field of struct traffic
CAUSES = {
    "redirected": ("Redirected", "from socket to socket, past TCP"),
    "undrained": ("Undrained", "passed to TCP: it had bytes under way, which must come first"),
    "over_budget": ("Over budget", "passed to TCP: the receiver is behind, or messages are small and many"),
    "no_peer": ("No peer", "passed to TCP: the other end is not in the map"),
}


def of_failure(kind: Kind) -> tuple[str, str]:
    """What a kind of failure is and what to do; a kind that is not known yet is named."""
    return FAILURES.get(kind, (f"{kind[0]}: {kind[1]}", ""))
