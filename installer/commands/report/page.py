"""Makes one self-contained HTML page of a node. Text from elsewhere (names, reasons) is escaped.

The templates are beside this module. The page works without its script, which only sorts and filters tables.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from installer.commands.report.drawing import draw
from installer.commands.report.view import NodeView
from installer.commands.sampling import figures, reasons
from installer.commands.sampling.flows import APP, PROXY, Flow, FlowEnd, InsideCounts
from installer.commands.sampling.sample import PASSED, REDIRECTED, Counts, PodSample, is_failure
from installer.verdict.verdict import State

_HERE = Path(__file__).parent
_MOST_FLOWS = 300
_MOST_PAST = 100
_MOST_CARRIED = 100
_TOO_SHORT = "not known: connections between two looks"


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
        "span": figures.span,
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
        past=_past(view)[:_MOST_PAST],
        more_past=max(0, len(_past(view)) - _MOST_PAST),
        carried=_carried(view)[:_MOST_CARRIED],
        more_carried=max(0, len(_carried(view)) - _MOST_CARRIED),
        failures=list(_failures(view)),
        causes=list(_causes(view)),
        fills=sorted(view.fills, key=lambda fill: -fill.share),
        place=lambda place: _place(place, names),
        way=_way,
        style=Markup((_HERE / "style.css").read_text()),
        script=Markup((_HERE / "page.js").read_text()),
    )
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"


def _past(view: NodeView) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each pod's document with each of its remote ends past the proxy, and why that is so."""
    found = []
    for pod in view.coverage:
        for title, name in (("", "past_the_proxy"), ("refused: ", "refusals")):
            for each in pod[name]:
                found.append((pod, each | {"told": f"{title}{each['why']} ({each['rule']})"}))
    return found


def _carried(view: NodeView) -> list[tuple[str, dict[str, Any]]]:
    """Each pod's name with each of its destinations and ports, those with the most bytes first."""
    rows = [(pod["pod"], each) for pod in view.carried for each in pod["flows"]]
    return sorted(rows, key=lambda row: -(row[1]["sent_bytes"] + row[1]["received_bytes"]))


def findings_of(view: NodeView) -> Iterator[Trouble]:
    """What an operator should know at once, gravest first: the verdict's findings, and what fails now."""
    for found in view.verdict.findings:
        yield Trouble(found.state is not State.NOTE, f"{found.part}: {found.what}", found.advice)
    for failure in _failures(view):
        if failure.rate:
            yield Trouble(True, f"{figures.rate(failure.rate)}/s {failure.what}", failure.advice)
    sample = view.sample
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
        return {"name": str(place.ip or _TOO_SHORT), "cookie": None}
    return {"name": names.get(place.cookie, "a pod that has gone"), "cookie": place.cookie}


def _way(flow: Flow) -> str:
    """Who holds the ends of most of a flow's connections; "" if none is open."""
    words = {PROXY: "proxy", APP: "application"}
    return " → ".join(words.get(end, "…") for end in flow.way) if flow.ways else ""
