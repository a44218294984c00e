"""Arranges the drawing of a node: pods that call on the left, pods that are called on the right.

A pod that does both appears twice, so that every line goes one way. The busiest pods are drawn. All others share one
box at the end, and are listed in the tables below the drawing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from installer.commands.report.view import NodeView
from installer.commands.sampling import figures
from installer.commands.sampling.flows import APP, PROXY, UNKNOWN, Flow, FlowEnd
from installer.commands.sampling.sample import Counts, PodSample

WIDTH = 1080
_CARD_WIDTH, _CARD_HEIGHT, _GAP, _TOP = 330, 62, 16, 40
_MOST = 12  # pods on each side
_MOST_LABELS = 10
_NAME_LENGTH = 34  # characters that fit a card
# a label's room, and where along its line it may be, the best place first
_LABEL_WIDTH, _LABEL_HEIGHT = 84, 16
_PLACES = (0.5, 0.35, 0.65, 0.25, 0.75, 0.42, 0.58, 0.18, 0.82)
# where lines touch a card, measured from its top
_PROXY_Y, _MIDDLE_Y, _APP_Y = 20, 31, 45

# boxes that are not pods
OUTSIDE, REST = "outside", "rest"
_Key = int | str


@dataclass(frozen=True)
class Card:
    """A box: one pod, everything outside of the mesh, or all other pods."""

    key: _Key
    x: int
    y: int
    title: str
    name: str
    line: str
    refused: str
    listening: bool
    is_caller: bool

    @property
    def is_pod(self) -> bool:
        """Whether the box is one pod."""
        return isinstance(self.key, int)

    @property
    def edge(self) -> int:
        """The x at which the box's lines begin or end."""
        return self.x + (_CARD_WIDTH if self.is_caller else 0)


@dataclass(frozen=True)
class Curve:
    """A line: the connections from one box to another that have the same kinds of ends."""

    path: str
    width: float
    kind: str  # captured, direct or ended
    accelerated: bool
    title: str
    label: str
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Drawing:
    """The whole drawing. It is WIDTH units wide."""

    height: int
    cards: tuple[Card, ...]
    curves: tuple[Curve, ...]
    quiet: int  # pods that are not drawn, because they have no connections now

    width = WIDTH
    card_width = _CARD_WIDTH
    card_height = _CARD_HEIGHT


@dataclass
class _Bundle:
    alive: int = 0
    ended: int = 0
    accelerated: int = 0
    opened: float = 0.0
    rate: float = 0.0

    def add(self, flow: Flow) -> None:
        self.alive += flow.alive
        self.ended += flow.ended
        self.accelerated += flow.accelerated
        self.opened += flow.opened
        self.rate += flow.rate


def draw(view: NodeView) -> Drawing:
    """Arrange the busiest pods and the connections between them."""
    callers, called = _side(view, caller=True), _side(view, caller=False)
    left = {each.key: each for each in _cards(view, callers, 0, True)}
    right = {each.key: each for each in _cards(view, called, WIDTH - _CARD_WIDTH, False)}
    bundles: dict[tuple[_Key, _Key, tuple[str, str]], _Bundle] = {}
    for flow in view.flows:
        ends = _box(flow.source, left), _box(flow.target, right)
        bundles.setdefault((*ends, flow.way), _Bundle()).add(flow)
    curves = tuple(_curves(bundles, left, right))
    rows = max(len(left), len(right))
    shown = {key for key in (*left, *right) if isinstance(key, int)}
    quiet = 0 if REST in left or REST in right else len(view.sample.pods) - len(shown)
    return Drawing(_TOP + rows * (_CARD_HEIGHT + _GAP), (*left.values(), *right.values()), curves, quiet)


def _side(view: NodeView, caller: bool) -> list[_Key]:
    """The boxes of one side, busiest first."""
    weights: dict[_Key, float] = {}
    for flow in view.flows:
        place = flow.source if caller else flow.target
        key = OUTSIDE if place.cookie is None else place.cookie
        weights[key] = weights.get(key, 0) + flow.rate + flow.opened + flow.alive / 1000
    for cookie, rates in view.rates.pods.items():
        busy = _outbound(rates) if caller else _inbound(rates)
        if busy:
            weights[cookie] = weights.get(cookie, 0) + busy
    has_outside = weights.pop(OUTSIDE, None) is not None
    busiest = sorted(weights, key=lambda key: (-weights[key], key))
    if caller and len(view.sample.pods) <= _MOST:  # on a small node, every pod is drawn
        busiest += [cookie for cookie in view.sample.pods if cookie not in weights]
    boxes: list[_Key] = [*busiest[:_MOST], *([REST] if len(busiest) > _MOST else [])]
    return [*boxes, *([OUTSIDE] if has_outside else [])]


def _cards(view: NodeView, keys: list[_Key], x: int, caller: bool) -> Iterator[Card]:
    drawn = {key for key in keys if isinstance(key, int)}
    for row, key in enumerate(keys):
        y = _TOP + row * (_CARD_HEIGHT + _GAP)
        if key == OUTSIDE:
            said = "pods without sidecar, the node, everything beyond"
            yield Card(key, x, y, "Outside of the mesh", "Outside of the mesh", said, "", False, caller)
        elif key == REST:
            name = f"{len(view.sample.pods) - len(drawn)} other pods"
            yield Card(key, x, y, name, name, "see the tables below", "", True, caller)
        else:
            assert isinstance(key, int)
            yield _pod_card(view.sample.pods[key], view.rates.pods[key], x, y, caller)


def _pod_card(pod: PodSample, rates: Counts, x: int, y: int, caller: bool) -> Card:
    direction = "outbound" if caller else "inbound"
    captured, direct = rates.of(direction, "captured"), rates.of(direction, "direct")
    line = f"{figures.rate(captured)}/s captured · {figures.rate(direct)}/s direct"
    if dns := rates.of("dns", "captured") * caller:
        line += f" · {figures.rate(dns)}/s DNS"
    failed = sum(rates.of(direction, verdict) for verdict in ("refused", "denied"))
    refused = f"{figures.rate(failed)}/s refused" if failed else ""
    name = str(pod.identity)
    return Card(pod.cookie, x, y, name, _shortened(name), line, refused, pod.listening, caller)


def _shortened(name: str) -> str:
    """The name without its middle, if it is long: pods of a deployment differ at the end."""
    if len(name) <= _NAME_LENGTH:
        return name
    head = (_NAME_LENGTH - 1) // 2
    return f"{name[:head]}…{name[head + 1 - _NAME_LENGTH :]}"


def _box(place: FlowEnd, cards: dict[_Key, Card]) -> _Key:
    if place.cookie is None:
        return OUTSIDE
    return place.cookie if place.cookie in cards else REST


def _curves(
    bundles: dict[tuple[_Key, _Key, tuple[str, str]], _Bundle], left: dict[_Key, Card], right: dict[_Key, Card]
) -> Iterator[Curve]:
    labelled = len(bundles) <= _MOST_LABELS
    taken: list[tuple[float, float]] = []
    for (source, target, way), bundle in bundles.items():
        start, end = left[source], right[target]
        y1, y2 = start.y + _anchor(start, way[0]), end.y + _anchor(end, way[1])
        x1, x2 = start.edge, end.edge
        bend = (x2 - x1) * 0.5
        label = _label(bundle) if labelled else ""
        x, y = _free_place(taken, [_along(t, (x1, y1), (x2, y2)) for t in _PLACES])
        if label:
            taken.append((x, y))
        told = _told(bundle)
        yield Curve(
            f"M{x1},{y1}C{x1 + bend:.0f},{y1} {x2 - bend:.0f},{y2} {x2},{y2}",
            min(9.0, 1.5 + 2.2 * math.log10(1 + bundle.alive + bundle.opened)),
            _kind(way),
            bundle.accelerated > 0,
            f"{start.title} ({_who(way[0])}) to {end.title} ({_who(way[1])}): {told}",
            label,
            x,
            y,
        )


def _along(t: float, start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """The place on a curve, from 0 at its start to 1 at its end."""
    (x1, y1), (x2, y2) = start, end
    bend = (x2 - x1) * 0.5
    return _bezier(t, x1, x1 + bend, x2 - bend, x2), _bezier(t, y1, y1, y2, y2)


def _free_place(taken: list[tuple[float, float]], places: list[tuple[float, float]]) -> tuple[float, float]:
    """The first of the places where a label does not touch another one; else the first."""

    def is_free(place: tuple[float, float]) -> bool:
        return all(abs(place[0] - x) > _LABEL_WIDTH or abs(place[1] - y) > _LABEL_HEIGHT for x, y in taken)

    return next(filter(is_free, places), places[0])


def _told(bundle: _Bundle) -> str:
    parts = [f"{bundle.alive} open"]
    if bundle.accelerated:
        parts.append(f"{bundle.accelerated} of them accelerated")
    if bundle.ended:
        parts.append(f"{bundle.ended} ended within a minute")
    return ", ".join([*parts, f"{figures.rate(bundle.opened)} new/s", f"{figures.size(bundle.rate)}/s by TCP"])


def _label(bundle: _Bundle) -> str:
    """The label of a line: bytes, or new connections if all bytes were redirected past TCP."""
    if bundle.rate >= 1:
        return f"{figures.size(bundle.rate)}/s"
    return f"{figures.rate(bundle.opened)} new/s" if bundle.opened else ""


def _kind(way: tuple[str, str]) -> str:
    if way == (UNKNOWN, UNKNOWN):
        return "ended"
    return "captured" if PROXY in way else "direct"


def _who(end: str) -> str:
    return {PROXY: "proxy", APP: "application"}.get(end, "not known")


def _anchor(card: Card, end: str) -> int:
    if not card.is_pod:
        return _MIDDLE_Y
    return {PROXY: _PROXY_Y, APP: _APP_Y}.get(end, _MIDDLE_Y)


def _bezier(t: float, *points: float) -> float:
    a, b, c, d = points
    s = 1 - t
    return round(s**3 * a + 3 * s * s * t * b + 3 * s * t * t * c + t**3 * d, 1)


def _outbound(rates: Counts) -> float:
    return sum(count for (direction, _), count in rates.connections.items() if direction != "inbound")


def _inbound(rates: Counts) -> float:
    return sum(count for (direction, _), count in rates.connections.items() if direction == "inbound")
