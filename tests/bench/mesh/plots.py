"""Ratios as pictures: one SVG a metric, a bar for each way and workload, whiskers over all rounds."""

from html import escape

from tests.bench.mesh.ratios import BASELINE, TITLES, Metric, Samples, Spread
from tests.bench.mesh.results import Results
from tests.bench.mesh.workloads import WORKLOADS

COLOURS = {
    "no-mesh": "#9aa5b1",
    "nftables": "#8a6d3b",
    "off": "#7fb3d5",
    "proxy": "#1f77b4",
    "full": "#0b3c5d",
    "unix": "#d9a441",
}
_LEFT, _WIDTH, _RIGHT = 330, 620, 60  # names, bars, figures: pixels
_BAR, _GAP, _TOP = 11, 12, 64
_STEPS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 50, 100)


def plot(results: Results, metric: Metric) -> str:
    """The SVG's text; empty axes where nothing was measured."""
    samples = Samples(results.samples)
    scenarios = [each for each in results.scenarios if each != BASELINE]
    groups: list[tuple[str, list[tuple[str, Spread]]]] = []
    for workload in results.workloads:
        found = [(name, ratio) for name in scenarios if (ratio := samples.ratio(workload, name, metric))]
        if found:
            groups.append((WORKLOADS[workload].title, found))
    longest = max((ratio.high for _, bars in groups for _, ratio in bars), default=1.0)
    scale = _WIDTH / max(1.2, longest)
    body, y = [], float(_TOP)
    for title, bars in groups:
        middle = y + len(bars) * _BAR / 2 + 4
        body.append(f'<text x="{_LEFT - 8}" y="{middle:.0f}" text-anchor="end">{escape(title)}</text>')
        for name, ratio in bars:
            body += _bar(name, ratio, y, scale)
            y += _BAR
        y += _GAP
    return "\n".join([_head(y + 10), *_axis(y, scale, longest), *_legend(metric, scenarios), *body, "</svg>", ""])


def _head(height: float) -> str:
    width = _LEFT + _WIDTH + _RIGHT
    size = f'width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}"'
    style = 'font-family="sans-serif" font-size="12"'
    white = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{white}'


def _bar(name: str, ratio: Spread, y: float, scale: float) -> list[str]:
    middle = y + _BAR / 2
    low, high = (_LEFT + each * scale for each in (ratio.low, ratio.high))
    length = ratio.median * scale
    return [
        f'<rect x="{_LEFT}" y="{y + 1:.1f}" width="{length:.1f}" height="{_BAR - 2}" fill="{COLOURS[name]}"/>',
        f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="#333" stroke-width="1"/>',
        f'<text x="{high + 4:.1f}" y="{middle + 3:.1f}" font-size="9">{ratio.median:.2f}</text>',
    ]


def _axis(bottom: float, scale: float, longest: float) -> list[str]:
    step = next((each for each in _STEPS if longest / each <= 8), 250)
    lines = []
    ticks = [number * step for number in range(int(max(1.2, longest) / step) + 1)]
    for tick in sorted({*ticks, 1}):
        x = _LEFT + tick * scale
        colour = "#c0392b" if tick == 1 else "#ddd"
        lines.append(f'<path d="M{x:.1f} {_TOP - 6}V{bottom:.0f}" stroke="{colour}"/>')
        lines.append(f'<text x="{x:.1f}" y="{_TOP - 10}" text-anchor="middle" font-size="10">{tick:g}</text>')
    return lines


def _legend(metric: Metric, scenarios: list[str]) -> list[str]:
    title = f"{TITLES[metric]}: ratio to iptables, same run; median of the rounds, lowest to highest"
    lines = [f'<text x="10" y="18" font-size="14">{escape(title)}</text>']
    for number, name in enumerate(scenarios):
        x = 10 + number * 80
        lines.append(f'<rect x="{x}" y="28" width="10" height="10" fill="{COLOURS[name]}"/>')
        lines.append(f'<text x="{x + 14}" y="38">{escape(name)}</text>')
    return lines
