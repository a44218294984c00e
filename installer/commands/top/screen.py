"""One screen of `sidestep top`: two lines about the node, then a table of as many pods as fit."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bpf.layout import TOTALS
from installer.commands.pods.pod_state import WELL
from installer.commands.sampling import figures
from installer.commands.sampling.sample import BYTES, Counts, PodSample, Rates, Sample

# lines that are not pods: the two lines of the head, the table's titles and rules, the foot
_OTHER_LINES = 7
_NOTHING = Counts(dict.fromkeys(TOTALS, 0), {})


@dataclass(frozen=True)
class Order:
    """A way to sort: the key that chooses it, its name, and the figure of a pod. The largest figure comes first."""

    key: str
    name: str
    of: Callable[[Counts], float]


ORDERS = (
    Order("c", "captured", lambda counts: counts.captured),
    Order("d", "direct", lambda counts: counts.direct),
    Order("f", "failed", lambda counts: counts.refused),
    Order("a", "accelerated", lambda counts: counts.messages.get(BYTES, 0)),
    Order("n", "name", lambda counts: 0),
)


def screen(sample: Sample, rates: Rates, order: Order, height: int, width: int) -> RenderableType:
    """The whole screen of a terminal with so many lines and columns."""
    pods = sorted(sample.pods.values(), key=lambda pod: str(pod.identity))
    pods.sort(key=lambda pod: -order.of(rates.pods.get(pod.cookie, _NOTHING)))
    shown = pods[: max(1, height - _OTHER_LINES)]
    left = f"{len(pods) - len(shown)} more pods below; " if len(shown) < len(pods) else ""
    keys = "  ".join(f"{each.key} {each.name}" for each in ORDERS)
    foot = Text(f"{left}sorted by {order.name}; keys: {keys}  q quit", style="dim", no_wrap=True, overflow="ellipsis")
    return Group(_head(sample, rates), _table(shown, rates, width), foot)


def _head(sample: Sample, rates: Rates) -> Text:
    unsteered = sum(pod.steering.is_open for pod in sample.pods.values())
    astray = sum(pod.processes.is_open for pod in sample.pods.values())
    attached = ("attached", "green") if sample.attached else ("NOT ATTACHED", "bold red")
    level = sample.level
    wanted = f" instead of {level.wanted}" if level.level != level.wanted else ""
    total = rates.total
    return Text.assemble(
        ("sidestep ", "bold"),
        attached,
        f"  {len(sample.pods)} pods  ",
        (f"{unsteered} not steered  " if unsteered else "", "bold red"),
        (f"{astray} with stray processes  " if astray else "", "bold red"),
        f"captured {figures.rate(total.captured)}/s  ",
        f"direct {figures.rate(total.direct)}/s  ",
        (f"failed {figures.rate(total.refused)}/s", "red" if total.refused else ""),
        f"\nacceleration {level.level}{wanted}: {figures.share(total.share)} of messages past TCP, "
        f"{figures.size(total.messages.get(BYTES, 0))}/s",
        no_wrap=True,
        overflow="ellipsis",
    )


def _state(pod: PodSample) -> Text:
    """The pod's state, as every command has it, with the number of stray processes."""
    strays = len(pod.processes.strays)
    is_open = pod.steering.is_open or pod.processes.is_open
    told = f"{pod.state}: {strays}" if strays and pod.state == "stray processes" else pod.state
    return Text(told, style="bold red" if is_open else "" if pod.state in WELL else "yellow")


# title → the figure of a pod. The first ones have room in 80 columns beside a pod's name, the others in more
_FIGURES: dict[str, Callable[[PodSample, Counts], str]] = {
    "out/s": lambda _, counts: figures.rate(counts.of("outbound", "captured") + counts.of("self", "captured")),
    "in/s": lambda _, counts: figures.rate(counts.of("inbound", "captured")),
    "failed/s": lambda _, counts: figures.rate(counts.refused),
    "direct/s": lambda _, counts: figures.rate(counts.direct),
    "dns/s": lambda _, counts: figures.rate(counts.of("dns", "captured")),
    "level": lambda pod, _: str(pod.level),
    "past TCP": lambda _, counts: figures.share(counts.share),
    "bytes/s": lambda _, counts: figures.size(counts.messages.get(BYTES, 0)),
}
_NARROW = 3  # figures
_ENOUGH = 120  # columns for all of them


def _table(pods: list[PodSample], rates: Rates, width: int) -> Table:
    """The pods' names get all the room that the figures leave."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=True)
    table.add_column("POD", ratio=1, no_wrap=True, overflow="ellipsis", min_width=12)
    table.add_column("STATE", no_wrap=True)
    shown = list(_FIGURES)[: None if width >= _ENOUGH else _NARROW]
    for title in shown:
        table.add_column(title.upper(), justify="left" if title == "level" else "right", no_wrap=True)
    for pod in pods:
        counts = rates.pods.get(pod.cookie, _NOTHING)
        cells = (
            Text(_FIGURES[title](pod, counts), style="red" if title == "failed/s" and counts.refused else "")
            for title in shown
        )
        table.add_row(Text(str(pod.identity)), _state(pod), *cells)
    return table
