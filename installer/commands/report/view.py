"""Gathers everything that the page shows from a node. The values are plain, so that tests can invent nodes."""

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bpf.pins import Pins
from bpf.tables import Tables
from cni.netns.namespaces import NoProcfs
from installer.commands.pods.refused import Refused, refused_pods
from installer.commands.sampling.flows import Flow, FlowWatcher, InsideCounts, Observation, flows_between
from installer.commands.sampling.sample import Fill, Rates, Sample, fills_of, rates_between, take_sample


@dataclass(frozen=True)
class NodeView:
    """One node, and what happened on it while it was observed."""

    name: str
    kernel: str
    taken: datetime
    sample: Sample
    rates: Rates
    fills: tuple[Fill, ...] = ()
    flows: tuple[Flow, ...] = ()
    inside: Mapping[int, InsideCounts] = field(default_factory=dict)
    unseen: Mapping[int, str] = field(default_factory=dict)  # pods whose sockets could not be read, and why
    blind: str = ""  # why no sockets could be read at all
    refused: Refused = field(default_factory=lambda: Refused(()))


def gather(pins: Pins, name: str, seconds: float, proc: Path, run_dir: Path) -> NodeView:
    """Observe the node for so many seconds. `proc` is its procfs, `run_dir` its agent's. Raises NotAttached."""
    with Tables(pins.look_only()) as tables:
        watcher = FlowWatcher(proc)
        before = take_sample(pins, tables, proc)
        first, _ = _observe(watcher, tables, before)
        time.sleep(max(0.0, before.at + seconds - time.monotonic()))
        after = take_sample(pins, tables, proc)
        second, blind = _observe(watcher, tables, after)
        fills = fills_of(tables)
    return NodeView(
        name or os.uname().nodename,
        platform.release(),
        datetime.now(UTC),
        after,
        rates_between(before, after),
        tuple(fills),
        tuple(flows_between(first, second)),
        second.inside,
        second.unseen,
        blind,
        refused_pods(run_dir, (str(pod.identity) for pod in after.pods.values())),
    )


def _observe(watcher: FlowWatcher, tables: Tables, sample: Sample) -> tuple[Observation, str]:
    """The connections that the sockets show, and why they show none. The page's counters do not depend on them."""
    try:
        return watcher.observe(tables, sample.pods), ""
    except NoProcfs as error:
        return Observation(), str(error)
    except OSError as error:
        return Observation(), f"{error.filename or 'namespaces'}: {error.strerror}"
