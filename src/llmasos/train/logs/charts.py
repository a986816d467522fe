"""Curves as inline SVG: no script, no request, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from llmasos.train.logs.words import number

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 28
MOST_POINTS = 600
"""Of a curve that is drawn: the least and the greatest value of each stretch stay."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """kind: a class of the style sheet ("raw", "line", "dots", or "run0" … "run5" of a comparison)."""

    name: str
    points: Sequence[Point]
    kind: str = "line"


def chart(id: str, title: str, about: str, curves: Sequence[Curve], *, from_zero: bool = False) -> str:
    """A figure; "" where no curve has a point. `about`: what is seen, for those who do not see it."""
    curves = [Curve(c.name, [p for p in c.points if all(map(math.isfinite, p))], c.kind) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    x_of, x_ticks = _axis([x for c in curves for x, _ in c.points], _LEFT, WIDTH - _RIGHT, whole=True)
    y_of, y_ticks = _axis([y for c in curves for _, y in c.points] + [0.0] * from_zero, HEIGHT - _BOTTOM, _TOP)
    lines = [
        f'<figure><figcaption id="{id}-title">{escape(title)}</figcaption>',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{id}-title" aria-describedby="{id}-about">',
        f'<desc id="{id}-about">{escape(about)}</desc>',
    ]
    for y in y_ticks:
        lines.append(f'<path class="grid" d="M{_LEFT} {y_of(y):.1f}H{WIDTH - _RIGHT}"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        lines.append(f'<text x="{x_of(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:,.0f}</text>')
    lines += [_drawn(curve, x_of, y_of) for curve in curves]
    lines.append("</svg>")
    if len(curves) > 1:
        keys = "".join(f'<li><i class="key {c.kind}"></i>{escape(c.name)}</li>' for c in curves)
        lines.append(f'<ul class="legend">{keys}</ul>')
    lines.append("</figure>")
    return "\n".join(lines)


def _drawn(curve: Curve, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    places = [(f"{x_of(x):.1f}", f"{y_of(y):.1f}") for x, y in thinned(curve.points)]
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    drawn = f'<path class="{curve.kind}" d="{path}"/>'
    if curve.kind == "dots" or len(places) == 1:
        drawn += "".join(f'<circle class="{curve.kind}" cx="{x}" cy="{y}" r="3"/>' for x, y in places)
    return drawn


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS, in their order."""
    if len(points) <= MOST_POINTS:
        return list(points)
    kept: list[Point] = []
    size = math.ceil(len(points) / (MOST_POINTS / 2))
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def smoothed(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over about a fiftieth of the curve, which begins without bias."""
    keep = 1 - 1 / max(1.0, len(points) / 50)
    total = weight = 0.0
    out = []
    for x, y in points:
        if math.isfinite(y):
            total, weight = keep * total + y, keep * weight + 1
            out.append((x, total / weight))
    return out


def _axis(
    values: Sequence[float], begin: float, end: float, *, whole: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """From values to places between `begin` and `end`, and where its ticks are."""
    least, most = min(values), max(values)
    if least == most:
        margin = 1.0 if whole else abs(least) * 0.1 or 1.0
        least, most = least - margin, most + margin
    step = _round_step((most - least) / 5)
    if whole:
        step = max(1.0, step)
    first = math.ceil(least / step)
    ticks = [i * step for i in range(first, first + 12) if i * step <= most + step * 1e-9]
    return lambda value: begin + (value - least) / (most - least) * (end - begin), ticks


def _round_step(step: float) -> float:
    scale = 10.0 ** math.floor(math.log10(step))
    return scale * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * scale >= step * (1 - 1e-9))
