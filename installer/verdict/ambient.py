"""Judges ambient mode: whether a ztunnel takes pods, and whether it has those that should be in the mesh."""

from collections.abc import Iterator

from installer.verdict.verdict import Finding, Looked, State, listed

_SEE_ZTUNNEL = (
    "see that ztunnel's pod runs on this node (`kubectl get pods -A -l app=ztunnel -o wide`) and mounts the directory "
    "of that socket; the agent hands the pods over by itself then"
)
_ZTUNNELS_LOG = (
    "read the log of this node's ztunnel (`kubectl logs -n istio-system -l app=ztunnel`), and see its limits"
)
_SEE_REASON = "see to the reason that is named; the agent tries again by itself"
# what a reason has in it → what to do about it; the others have _SEE_REASON
_ADVICE = (
    ("istio-cni's netfilter rules", "create the pod anew where istio-cni's plugin is not in the CNI chain"),
    ("failure to start proxy", "free ztunnel's ports 15001, 15006, 15008 and 15053 in the pod; ztunnel's log has more"),
    ("ztunnel", _ZTUNNELS_LOG),
    ("forbidden", "allow the agent's ServiceAccount to patch pods/status, as the chart does"),
    (
        "processes are not found",
        "give --proc the node's procfs; if it is, look whether kubelet knows that the pod has ended",
    ),
    ("reroute-virtual-interfaces", "take the annotation away, or keep the pod out of ambient mode by its label"),
)


def ambient(told: Looked, pods: list[Looked], is_agent_well: bool) -> Iterator[Finding]:
    """What is wrong in ambient mode. `pods` are the enrolled ones.

    Without a ztunnel every pod is pending, which is one fault. If the agent is away, that is the fault, and not what is
    unknown because of it.
    """
    enrolled = [pod for pod in pods if pod["is_ambient"]]
    if told["is_on"] is None:
        if told["is_expected"] and is_agent_well:
            what = f"which pods are in the mesh is not known: {told['unknown']}"
            yield Finding(State.UNKNOWN, "ambient", what, "use the command in the agent's image, or restart the agent")
        yield from _without_ztunnel([pod for pod in enrolled if pod["state"] == "pending"])
        return
    if not told["is_on"]:
        if enrolled:
            what = f"it is off, and nobody hands these pods to a new ztunnel: {listed(_names(enrolled))}"
            yield Finding(
                State.WRONG, "ambient", what, "switch it on again, or take the labels away and create the pods anew"
            )
        return
    if told["problem"]:
        waiting = listed([each["pod"] for each in told["pods"] if each["state"] == "pending"])
        what = f"{told['problem']}; pending: {waiting or 'no pod yet, but new ones wait'}"
        yield Finding(State.WRONG, "ambient", what, _SEE_ZTUNNEL)
    yield from _failed(told)
    handed = {each["uid"] for each in told["pods"] if each["state"] == "ambient"}
    if not told["problem"]:
        yield from _without_ztunnel([pod for pod in enrolled if pod["state"] == "pending" and pod["uid"] in handed])


def _failed(told: Looked) -> Iterator[Finding]:
    """The pods for which something else has failed than that no ztunnel takes pods."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in told["pods"]:
        is_of_ztunnel = "ztunnel" in each["reason"] or each["reason"] == told["problem"]
        if each["reason"] and not (told["problem"] and is_of_ztunnel):
            reasons.setdefault((each["state"], each["reason"]), []).append(each["pod"])
    for (state, reason), names in reasons.items():
        what = f"{state}: {reason}: {listed(names)}"
        yield Finding(State.WRONG, "ambient", what, next((how for part, how in _ADVICE if part in reason), _SEE_REASON))


def _without_ztunnel(pods: list[Looked]) -> Iterator[Finding]:
    """Pods that no ztunnel listens in, whatever the agent knows."""
    if pods:
        what = f"pending: ztunnel does not listen in them, so their connections are refused: {listed(_names(pods))}"
        yield Finding(State.WRONG, "ambient", what, _ZTUNNELS_LOG)


def _names(pods: list[Looked]) -> list[str]:
    return [pod["pod"] for pod in pods]
