"""Gathers everything that the page shows from a node. The values are plain, so that tests can invent nodes."""

import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from bpf.tables import Tables
from cni.netns.namespaces import NoProcfs
from installer import VERSION
from installer.commands.coverage.coverage_document import coverage_documents
from installer.commands.flows.flows_document import flows_documents
from installer.commands.pods.refused import Refused, refused_pods
from installer.commands.sampling.flows import (
    PROXY,
    UNKNOWN,
    Flow,
    FlowEnd,
    FlowWatcher,
    InsideCounts,
    Observation,
    flows_between,
)
from installer.commands.sampling.sample import Fill, Rates, Sample, fills_of, rates_between, take_sample
from installer.commands.status.status_document import status_document
from installer.settings import Attachment, Chain, Node, Ports, Shadow
from installer.verdict.node import verdict_on
from installer.verdict.verdict import Verdict


@dataclass(frozen=True)
class NodeView:
    """One node, and what happened on it while it was observed."""

    name: str
    kernel: str
    taken: datetime
    sample: Sample
    rates: Rates
    verdict: Verdict  # that of `sidestep status`
    fills: tuple[Fill, ...] = ()
    flows: tuple[Flow, ...] = ()
    inside: Mapping[int, InsideCounts] = field(default_factory=dict)
    unseen: Mapping[int, str] = field(default_factory=dict)  # pods whose sockets could not be read, and why
    blind: str = ""  # why no sockets could be read at all
    refused: Refused = field(default_factory=lambda: Refused(()))
    coverage: tuple[dict[str, Any], ...] = ()  # of pods with traffic past their proxies, as `sidestep coverage` has it
    carried: tuple[dict[str, Any], ...] = ()  # of pods that have had connections, as `sidestep flows` has it
    about: tuple[str, ...] = ()  # what runs here: version, agent, chain


def gather(attachment: Attachment, chain: Chain, node: Node, ports: Ports, shadow: Shadow, seconds: float) -> NodeView:
    """Observe the node for so many seconds. Raises NotAttached."""
    pins, proc = attachment.pins, node.proc
    with Tables(pins.look_only()) as tables:
        watcher = FlowWatcher(proc)
        before = take_sample(pins, tables, proc)
        first, _ = _observe(watcher, tables, before)
        time.sleep(max(0.0, before.at + seconds - time.monotonic()))
        after = take_sample(pins, tables, proc)
        second, blind = _observe(watcher, tables, after)
        fills = fills_of(tables)
    rates, flows = rates_between(before, after), flows_between(first, second)
    status = status_document(attachment, chain, node, ports, shadow)
    return NodeView(
        node.kubernetes_node_name or os.uname().nodename,
        platform.release(),
        datetime.now(UTC),
        after,
        rates,
        verdict_on(status),
        tuple(fills),
        (*flows, *too_short(flows, rates)),
        second.inside,
        second.unseen,
        blind,
        refused_pods(node.cni_agent_run_dir, (str(pod.identity) for pod in after.pods.values())),
        tuple(each for each in coverage_documents(pins, proc) if each["past_the_proxy"] or each["refusals"]),
        tuple(each for each in flows_documents(pins, proc) if each["flows"]),
        tuple(_about(status)),
    )


def too_short(flows: Iterable[Flow], rates: Rates) -> Iterator[Flow]:
    """What the counters know of inbound connections, and the sockets don't: they came and went between two looks.

    Of these nobody knows who called. Those whose client is a pod of this node are seen at that end, by TIME_WAIT.
    """
    for cookie, counts in rates.pods.items():
        seen = sum(flow.opened for flow in flows if flow.target == FlowEnd(cookie))
        unseen = counts.of("inbound", "captured") + counts.of("inbound", "direct") - seen
        if unseen * rates.seconds >= 1:
            flow = Flow(FlowEnd(None), FlowEnd(cookie), opened=unseen)
            flow.ways[UNKNOWN, PROXY] += 1
            yield flow


def _about(status: Mapping[str, Any]) -> Iterator[str]:
    agent, chain = status["agent"], status["chain"]
    yield f"sidestep {VERSION}"
    health = agent["health"]
    state = "ready" if health["ready"] else "not ready"
    yield f"agent {agent['version'] or 'of unknown version'}: {agent['fault'] or health['fault'] or state}"
    entry = chain["entry"]
    told = (
        f"{entry['file']}: {entry['fault'] or 'entry in place'}" if chain["is_ours"] else "not installed by this agent"
    )
    yield f"chain: {told}"


def _observe(watcher: FlowWatcher, tables: Tables, sample: Sample) -> tuple[Observation, str]:
    """The connections that the sockets show, and why they show none. The page's counters do not depend on them."""
    try:
        return watcher.observe(tables, sample.pods), ""
    except NoProcfs as error:
        return Observation(), str(error)
    except OSError as error:
        return Observation(), f"{error.filename or 'namespaces'}: {error.strerror}"
