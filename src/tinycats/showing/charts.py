"""Curves as SVG: one file each, readable in light and in dark, by itself or in a page. Standard library only."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 640, 300  # of the drawing's own units; it is as wide as its place
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 28, 56, 34
MAX_POINTS = 400  # of a curve; more are not to be told apart

_STYLE = (
    ".chart text{font:13px system-ui,sans-serif;fill:#444}.chart .grid{stroke:#8884}.chart .name{font-weight:600}"
    "@media(max-width:40rem){.chart text{font-size:19px}}@media(prefers-color-scheme:dark){.chart text{fill:#ccc}}"
)

# Okabe and Ito's colours, which the colour-blind tell apart, and dashes, for print.
_STYLES = (("#0072b2", ""), ("#d55e00", "7 3"), ("#009e73", "2 3"), ("#cc79a7", "9 3 2 3"))

# Of the rows of metrics.jsonl, what belongs together.
_CURVES = {
    "Loss": ("loss", "train_loss", "val_loss"),
    "Accuracy": ("val_accuracy", "balanced_accuracy", "cat_accuracy"),
    "Calibration error": ("calibration_error",),
    "Learning rate": ("lr",),
}

Points = Sequence[tuple[float, float]]


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The charts, SVG by title, of a run's metrics; those of which there is something to see."""
    charts = {}
    for title, names in _CURVES.items():
        series = {
            name: [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)] for name in names
        }
        if shown := {name: points for name, points in series.items() if points}:
            charts[title] = line_chart(title, shown)
    return charts


def line_chart(title: str, series: Mapping[str, Points]) -> str:
    """An SVG of some curves over the steps.

    Args:
        series: (x, y) in the order of x, by the curve's name; what is not finite is left out.
    """
    kept = {
        name: _thinned([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
        for name, points in series.items()
    }
    xs, ys = ([point[axis] for points in kept.values() for point in points] for axis in (0, 1))
    x_ticks, y_ticks = _ticks(min(xs, default=0), max(xs, default=1)), _ticks(min(ys, default=0), max(ys, default=1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{tick:g}</text>')
    legend = _LEFT
    for (name, points), (colour, dashes) in zip(kept.items(), _STYLES, strict=False):
        line = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in points))
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        elif points:
            parts.append(f'<path {line} d="M{path}"/>')
        parts.append(f'<path {line} d="M{legend} 36h22"/><text x="{legend + 28}" y="40">{html.escape(name)}</text>')
        legend += 44 + 8 * len(name)
    last = "; ".join(f"{name} {points[-1][1]:.4g} at step {points[-1][0]:g}" for name, points in kept.items() if points)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart">'
        f"<title>{html.escape(title)} over the steps</title><desc>{html.escape(last)}</desc>"
        f"<style>{_STYLE}</style>"
        f'<text class="name" x="{_LEFT}" y="18">{html.escape(title)}</text>{"".join(parts)}</svg>'
    )


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = math.ceil(len(points) / MAX_POINTS)
    return points[:: -stride or -1][::-1] if stride > 1 else points  # the last one always


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers, the first no higher than `low` and the last no lower than `high`."""
    if high - low <= 1e-4 * max(abs(low), abs(high)):  # nothing that round numbers could tell apart
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    raw = (high - low) / 5
    magnitude = 10 ** math.floor(math.log10(raw))
    step = magnitude * next(factor for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.6g}") for number in range(first, last + 1)]
