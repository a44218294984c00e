"""`kubectl sidestep status` and `pods`: every agent is asked at once, and the cluster gets one verdict."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

import click

from installer.kubectl.agents import Agent, Nodes, has_sidecar
from installer.kubectl.kubectl import Kubectl, KubectlFailed
from installer.kubectl.tables import show_table

Told = TypeVar("Told")

_AT_ONCE = 16
# as in `sidestep status`
OK, WRONG, UNKNOWN, NOTE = "ok", "wrong", "unknown", "note"
_MARKS = {WRONG: "✗", UNKNOWN: "?", NOTE: "·"}
_EXIT = {OK: 0, WRONG: 1, UNKNOWN: 3}


@dataclass(frozen=True)
class NodeStatus:
    """One node's: its state, one line about it, how many pods it has, and the findings of its agent."""

    node: str
    state: str
    headline: str
    pods: int | None = None
    findings: tuple[dict[str, Any], ...] = ()


def every_status(kubectl: Kubectl, nodes: Nodes) -> list[NodeStatus]:
    """A node without an agent is wrong if a pod with a sidecar runs there."""
    idle = [name for name, agent in nodes.agents.items() if agent is None]
    uncaptured = _sidecars_on(kubectl, idle)

    def status(name: str, agent: Agent | None) -> NodeStatus:
        return without_agent(name, uncaptured[name]) if agent is None else judged(name, agent)

    return _from_each(nodes, status)


def judged(name: str, agent: Agent) -> NodeStatus:
    """What the agent's own `sidestep status` says; if it can't be asked, nobody knows."""
    try:
        told = agent.ask("status")
        verdict, pods = told["verdict"], len(told["pods"])
    except KubectlFailed as error:
        return NodeStatus(name, UNKNOWN, f"{agent.pod} does not tell: {error}")
    except (KeyError, TypeError):
        return NodeStatus(name, UNKNOWN, f"{agent.pod} tells no verdict; is {agent.image} sidestep, of this version?")
    return NodeStatus(name, verdict["state"], verdict["headline"], pods, tuple(verdict["findings"]))


def without_agent(name: str, sidecars: int) -> NodeStatus:
    """Nobody captures what starts there."""
    if sidecars:
        return NodeStatus(name, WRONG, f"no agent runs there, and {sidecars} pods with a sidecar do")
    return NodeStatus(name, OK, "no agent runs there, and no pod with a sidecar does", 0)


def verdict_on(found: list[NodeStatus]) -> tuple[str, str]:
    """The state of the cluster, and a line about it."""
    counts = Counter(each.state for each in found)
    if not found:
        return UNKNOWN, "UNKNOWN: the cluster has no nodes"
    if not (counts[WRONG] or counts[UNKNOWN]):
        return OK, f"OK: nothing is wrong on {_nodes(len(found))}"
    parts = [f"{counts[state]} of {_nodes(len(found))} {word}" for state, word in _BAD if counts[state]]
    state = WRONG if counts[WRONG] else UNKNOWN
    return state, f"{state.upper()}: {'; '.join(parts)}"


_BAD = ((WRONG, "with something wrong"), (UNKNOWN, "can't be told"))


def show_status(found: list[NodeStatus]) -> int:
    """Print it: the verdict, a line for each node, and what was found. Returns the exit status."""
    state, line = verdict_on(found)
    click.echo(line)
    rows: list[tuple[object, ...]] = [
        (each.node, each.state.upper(), each.pods, each.headline.partition(": ")[2] or each.headline) for each in found
    ]
    show_table(("node", "verdict", "pods", "in short"), rows)
    for each in found:
        for finding in each.findings:
            if finding["state"] in (WRONG, UNKNOWN):
                click.echo(f"{_MARKS[finding['state']]} {each.node}: {finding['part']}: {finding['what']}")
                if finding["advice"]:
                    click.echo(f"    → {finding['advice']}")
    return _EXIT[state]


def every_pod(nodes: Nodes) -> tuple[list[dict[str, Any]], list[str]]:
    """The mesh pods, each with its `node`; and a sentence for each agent that did not tell."""
    silent: list[str] = []

    def pods(name: str, agent: Agent | None) -> list[dict[str, Any]]:
        if agent is None:
            return []
        try:
            return [{"node": name, **each} for each in agent.ask("pods")]
        except KubectlFailed as error:
            silent.append(f"{name}: {agent.pod} does not tell: {error}")
            return []

    return [each for found in _from_each(nodes, pods) for each in found], silent


def show_pods(pods: list[dict[str, Any]], namespace: str) -> None:
    """Print them, of one namespace or of all if that is ""."""
    rows: list[tuple[object, ...]] = []
    for each in pods:
        where, _, name = each["pod"].partition("/")
        if namespace in ("", where):
            rows.append((each["node"], where, name, each["state"]))
    rows.sort(key=itemgetter(1, 2))
    show_table(("node", "namespace", "name", "state"), rows)


def _from_each(nodes: Nodes, told: Callable[[str, Agent | None], Told]) -> list[Told]:
    """By node, in their order."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda each: told(*each), nodes.agents.items()))


def _sidecars_on(kubectl: Kubectl, names: list[str]) -> Counter[str]:
    """How many pods with a sidecar run on each of these nodes."""
    if not names:
        return Counter()
    pods = kubectl.items("pods", "--all-namespaces", "--field-selector", "status.phase=Running")
    return Counter(each["spec"]["nodeName"] for each in pods if each["spec"]["nodeName"] in names and has_sidecar(each))


def _nodes(count: int) -> str:
    return "one node" if count == 1 else f"{count} nodes"
