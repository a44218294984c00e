"""Makes one self-contained HTML page of a node. Text from elsewhere (names, reasons) is escaped.

The templates are beside this module. The page works without its script, which only sorts and filters tables.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cni.enrolment.steered import Steering
from cni.enrolment.strays import NOT_KNOWN, told_of
from installer.commands.report.drawing import draw
from installer.commands.report.view import NodeView
from installer.commands.sampling import figures, reasons
from installer.commands.sampling.flows import APP, PROXY, Flow, FlowEnd, InsideCounts
from installer.commands.sampling.sample import PASSED, REDIRECTED, Counts, PodSample, is_failure

_HERE = Path(__file__).parent
_MOST_FLOWS = 300
_NEARLY_FULL = 0.8
_STRAY = "They run outside of the pod's cgroups: end them, or move them back."


@dataclass(frozen=True)
class Trouble:
    """Something that an operator should know. It is `grave` if traffic suffers."""

    grave: bool
    text: str
    detail: str = ""


@dataclass(frozen=True)
class PodRow:
    """One line of the table of pods."""

    pod: PodSample
    rates: Counts
    inside: InsideCounts | None


@dataclass(frozen=True)
class Failure:
    """One reason why connections failed."""

    what: str
    advice: str
    rate: float
    total: float
    pods: tuple[str, ...]


@dataclass(frozen=True)
class Cause:
    """One outcome of messages on accelerated connections."""

    name: str
    title: str
    told: str
    rate: float
    total: float
    share: float


def render(view: NodeView) -> str:
    """The page as HTML."""
    loader = FileSystemLoader(_HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "rate": figures.rate,
        "count": figures.count,
        "size": figures.size,
        "share": figures.share,
    }
    names = {cookie: str(pod.identity) for cookie, pod in view.sample.pods.items()}
    page = environment.get_template("page.html").render(
        view=view,
        drawing=draw(view),
        findings=list(findings_of(view)),
        rows=list(_rows(view)),
        flows=view.flows[:_MOST_FLOWS],
        more_flows=max(0, len(view.flows) - _MOST_FLOWS),
        failures=list(_failures(view)),
        causes=list(_causes(view)),
        fills=sorted(view.fills, key=lambda fill: -fill.share),
        place=lambda place: _place(place, names),
        way=_way,
        style=Markup((_HERE / "style.css").read_text()),
        script=Markup((_HERE / "page.js").read_text()),
    )
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"


def findings_of(view: NodeView) -> Iterator[Trouble]:
    """What an operator should know at once, gravest first."""
    sample = view.sample
    if not sample.attached:
        yield Trouble(True, "Programs are not attached", "New connections are not captured. See `sidestep status`.")
    for state in (each for each in Steering if each.is_open):
        if names := [str(pod.identity) for pod in sample.pods.values() if pod.steering == state]:
            yield Trouble(True, f"{_several(names)}: {state.words}", "`sidestep status` lists all such pods.")
    for pod in sample.pods.values():
        if pod.processes.strays:
            yield Trouble(True, f"{pod.identity}: {told_of(pod.processes.strays)}", _STRAY)
    for reason in dict.fromkeys(pod.processes.unknown for pod in sample.pods.values() if pod.processes.unknown):
        names = [str(pod.identity) for pod in sample.pods.values() if pod.processes.unknown == reason]
        yield Trouble(True, f"{_several(names)}: {NOT_KNOWN}", reason)
    for failure in _failures(view):
        if failure.rate:
            yield Trouble(True, f"{figures.rate(failure.rate)}/s {failure.what}", failure.advice)
    deaf: dict[str, list[str]] = {}
    for pod in sample.pods.values():
        if not pod.listening:
            deaf.setdefault(pod.proxy.words, []).append(str(pod.identity))
    for words, names in deaf.items():
        yield Trouble(True, f"{_several(names)}: {words}", "Inbound connections there are refused.")
    if refused := [each["pod"] for each in view.refused.pods]:
        yield Trouble(True, f"{_several(refused)}: refused", "They don't start; the table of refused pods says why.")
    for fill in view.fills:
        if fill.share > _NEARLY_FULL:
            text = f"Map {fill.name} is {figures.share(fill.share)} full"
            yield Trouble(True, text, "When it is full, pods are refused. Spread them over more nodes.")
    if sample.level.level < sample.level.wanted:
        text = f"Acceleration is {sample.level.level} instead of {sample.level.wanted}"
        yield Trouble(False, text, sample.level.reason)
    if view.blind:
        yield Trouble(False, "Connections could not be read", view.blind)
    elif view.unseen:
        names = [str(sample.pods[cookie].identity) for cookie in view.unseen if cookie in sample.pods]
        why = next(iter(view.unseen.values()))
        yield Trouble(False, f"The connections of {_several(names)} could not be read", why)


def _several(names: list[str]) -> str:
    few = ", ".join(sorted(names)[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} other pods"


def _rows(view: NodeView) -> Iterator[PodRow]:
    for cookie, pod in sorted(view.sample.pods.items(), key=lambda each: str(each[1].identity)):
        yield PodRow(pod, view.rates.pods[cookie], view.inside.get(cookie))


def _failures(view: NodeView) -> Iterator[Failure]:
    sample, rates = view.sample, view.rates
    for kind in filter(is_failure, sample.total.connections):
        total = sample.total.connections[kind]
        affected = sorted(
            (-rates.pods[pod.cookie].of(*kind), -pod.counts.of(*kind), str(pod.identity))
            for pod in sample.pods.values()
            if pod.counts.of(*kind)
        )
        what, advice = reasons.of_failure(kind)
        yield Failure(what, advice, rates.total.of(*kind), total, tuple(name for *_, name in affected))


def _causes(view: NodeView) -> Iterator[Cause]:
    messages, rates = view.sample.total.messages, view.rates.total.messages
    whole = sum(messages.get(name, 0) for name in (REDIRECTED, *PASSED))
    for name in (REDIRECTED, *PASSED):
        count = messages.get(name, 0)
        yield Cause(name, *reasons.CAUSES[name], rates.get(name, 0), count, count / whole if whole else 0)


def _place(place: FlowEnd, names: dict[int, str]) -> dict[str, Any]:
    """How the page shows an end of a flow: a pod with a link to its row, or an address."""
    if place.cookie is None:
        return {"name": str(place.ip), "cookie": None}
    return {"name": names.get(place.cookie, "a pod that has gone"), "cookie": place.cookie}


def _way(flow: Flow) -> str:
    """Who holds the ends of most of a flow's connections; "" if none is open."""
    words = {PROXY: "proxy", APP: "application"}
    return " → ".join(words.get(end, "…") for end in flow.way) if flow.ways else ""
