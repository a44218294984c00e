"""`kubectl sidestep test`: real connections between mesh pods, on one node and across nodes, and who captured them.

A connection is captured if the agents of both nodes have counted it: one outbound connection more of the client's pod,
and one inbound more of the server's. And the application must have been called by its proxy.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import click

from installer.kubectl.agents import Agent
from installer.kubectl.kubectl import Kubectl
from installer.kubectl.trial_pods import TrialPod, asked
from installer.kubectl.whereabouts import in_url

PROXY = (
    "127.0.0.6"  # where Istio's sidecars call their application from (InboundPassthroughCluster and inbound clusters)
)
# pod → direction → captured connections until now
Counts = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Trial:
    """One request. `wrong` is what was not as it should be, "" if nothing was."""

    what: str
    wrong: str


def trials(kubectl: Kubectl, agents: list[Agent], pods: list[TrialPod]) -> Iterator[Trial]:
    """From the first pod to each other and back, by Pod IP and by Service. Raises KubectlFailed."""
    client, *servers = pods
    before = _counted(agents)
    for one, other in [pair for server in servers for pair in ((client, server), (server, client))]:
        for by, host in (("Pod IP", in_url(other.address)), ("Service", other.host)):
            where = f"on {one.node}" if one.node == other.node else f"from {one.node} to {other.node}"
            fault, answer = "", {}
            try:
                answer = asked(kubectl, one, host)
            except click.ClickException as error:
                fault = error.format_message()
            after = _counted(agents)
            counts = _more(one, "outbound", before, after), _more(other, "inbound", before, after)
            before = after
            yield Trial(
                f"{where}, {one.name} to {other.name} by {by}", fault or wrong_with(answer, other.name, *counts)
            )


def wrong_with(answer: dict[str, str], server: str, outbound: int | None, inbound: int | None) -> str:
    """What is wrong with an answer, given how many connections more were captured: of the client, at the server.

    None: no agent knows the pod.
    """
    faults = (
        (answer["server"] != server, f"{answer['server']} has answered"),
        (outbound is None, "no agent knows the client's pod"),
        (inbound is None, "no agent knows the server's pod"),
        (outbound == 0, "NOT captured at the client"),
        (inbound == 0, "NOT captured at the server"),
        (answer["caller"] != PROXY, f"the application was called by {answer['caller']}, not by its proxy"),
    )
    return "; ".join(words for is_so, words in faults if is_so)


def _counted(agents: list[Agent]) -> Counts:
    with ThreadPoolExecutor() as pool:
        told = [pod for pods in pool.map(lambda agent: agent.ask("pods"), agents) for pod in pods]
    return {
        pod["pod"]: {direction: counts["captured"] for direction, counts in pod["connections"].items()}
        for pod in told
        if "connections" in pod  # else it is one that sidestep does not capture
    }


def _more(pod: TrialPod, direction: str, before: Counts, after: Counts) -> int | None:
    if str(pod) not in before or str(pod) not in after:
        return None
    return after[str(pod)][direction] - before[str(pod)][direction]
