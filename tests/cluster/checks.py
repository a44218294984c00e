"""What is held against what should be: each check a sentence and a look, counted at the end."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import click

from tests.cluster.cluster import Cluster
from tests.cluster.host import CommandFailed
from tests.cluster.pods import PodName, Pods, Reply
from tests.cluster.sidestep import Sidestep


@dataclass(frozen=True)
class Check:
    """`look` returns what is wrong, "" if nothing is."""

    sentence: str
    look: Callable[[], str]


def run_all(checks: Iterable[Check]) -> tuple[int, int]:
    """Say a line of each as it comes; how many were as expected, of how many."""
    verdicts = [_run(each) for each in checks]
    return sum(verdicts), len(verdicts)


def _run(check: Check) -> bool:
    try:
        wrong = check.look()
    except (CommandFailed, LookupError, TimeoutError) as error:
        wrong = f"{type(error).__name__}: {error}"
    click.echo(f"{check.sentence}: {f'NOT as expected: {wrong}' if wrong else 'as expected'}")
    return not wrong


def of_nodes(cluster: Cluster, sidestep: Sidestep) -> list[Check]:
    """sidestep as kubelet and containerd run it."""
    found = []
    for node in cluster.nodes:
        chain = ["bridge", "portmap", "sidestep-cni"]
        found += [
            Check(f"the agent on {node.name} is Ready", equals(partial(sidestep.is_ready_on, node.name), True)),
            Check(f"the plugin is the last of {node.name}'s chain", equals(node.plugins, chain)),
            Check(f"status on {node.name} finds nothing wrong", equals(partial(sidestep.is_attached, node.name), True)),
        ]
    return found


def of_plain_pods(pods: Pods, client: PodName, servers: Iterable[PodName]) -> list[Check]:
    """Pods outside of the mesh start and are reached as if sidestep were not there."""
    found = []
    for server in servers:
        for host in (server.host, pods.ip(server)):
            found.append(Check(f"{client} reaches {server} at {host}", answered_by(pods, client, host, server)))
    return found


def answered_by(pods: Pods, client: PodName, host: str, server: PodName, *identities: str) -> Callable[[], str]:
    """The server answers; the proxies between say these `identities`, none if none are given."""

    def look() -> str:
        return wrong_with(pods.ask(client, host), server, identities)

    return look


def equals(ask: Callable[[], object], wanted: object) -> Callable[[], str]:
    """What is found is `wanted`."""

    def look() -> str:
        found = ask()
        return "" if found == wanted else str(found)

    return look


def wrong_with(reply: Reply, server: PodName, identities: Iterable[str]) -> str:
    """What is wrong with it, "" if nothing is."""
    if reply.server != server.name:
        return reply.error or f"answered by {reply.server or 'nobody'}"
    missing = [each for each in identities if each not in reply.identities]
    if missing or (reply.identities and not identities):
        return f"the proxies said {reply.identities or 'nothing'}"
    return ""
