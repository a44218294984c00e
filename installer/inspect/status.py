"""`sidestep status`: what the maps say about this node, readable with and without a running agent."""

from typing import Any

from bpf.acceleration import NodeLevel, level_of
from bpf.attachment import is_attached
from bpf.layout import Level, Pod, Traffic
from bpf.pins import Pins
from bpf.tables import Tables
from cni.entries import Identity

_TITLES = ("pod", "level", "redirected", "bytes", "undrained", "over budget", "no peer")


def status_of(pins: Pins) -> dict[str, Any]:
    """The document that is printed. Raises NotAttached."""
    with Tables(pins) as tables:
        node = level_of(tables)
        pods = [_pod(pod, tables.traffic.get(key) or Traffic(), node) for key, pod in tables.pods.every()]
    return {
        "attached": is_attached(pins),
        "acceleration": {"level": str(node.level), "wanted": str(node.wanted), "reason": node.reason},
        "pods": sorted(pods, key=lambda each: str(each["pod"])),
    }


def _pod(pod: Pod, traffic: Traffic, node: NodeLevel) -> dict[str, Any]:
    sums = {name: getattr(traffic, name) for name, *_ in Traffic._fields_}
    return {
        "pod": str(Identity.of(pod)),
        "uid": pod.uid.decode(),
        "acceleration": {"level": str(min(Level(pod.acceleration), node.level)), **sums},
    }


def table_of(document: dict[str, Any]) -> str:
    """The same for people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    told = document["acceleration"]
    level = told["level"] if told["level"] == told["wanted"] else f"{told['level']} instead of {told['wanted']}"
    console = Console()
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in _TITLES:
        table.add_column(title, justify="left" if title in _TITLES[:2] else "right")
    for each in document["pods"]:
        sums = each["acceleration"]
        table.add_row(each["pod"], *(str(value) for value in sums.values()))
    with console.capture() as captured:
        console.print(f"programs: {'attached' if document['attached'] else 'NOT attached'}", highlight=False)
        console.print(f"acceleration: {level}{told['reason'] and ' (' + told['reason'] + ')'}", highlight=False)
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
