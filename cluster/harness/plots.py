"""Plots as SVG text, for a page that needs nothing but itself: points over time, and how a figure is distributed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 24, 36
COLOURS = ("#2563a8", "#c2571a", "#2e7d4f", "#8a3ea8")
Points = Sequence[tuple[float, float]]


def scatter(title: str, series: dict[str, Points], x: str, y: str, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Points of several series. marks: vertical lines with a word."""
    frame = _Frame([point for points in series.values() for point in points], [at for at, _ in marks])
    parts = [frame.axes(title, x, y)]
    for at, word in marks:
        left = frame.x(at)
        parts.append(f'<line x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#b00020"/>')
        parts.append(f'<text x="{left + 3:.1f}" y="{TOP + 10}" fill="#b00020">{escape(word)}</text>')
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        dots = "".join(f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="3"/>' for a, b in points)
        parts.append(f'<g fill="{colour}" fill-opacity="0.7"><title>{escape(name)}</title>{dots}</g>')
    return _svg(parts + _legend(list(series)))


def distribution(title: str, series: dict[str, Sequence[float]], x: str) -> str:
    """The share of values up to x, one line for each series."""
    lines = {name: _steps(values) for name, values in series.items()}
    frame = _Frame([point for points in lines.values() for point in points] + [(0.0, 0.0), (0.0, 1.0)], [])
    parts = [frame.axes(title, x, "share")]
    for colour, points in zip(COLOURS, lines.values(), strict=False):
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in points)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
    return _svg(parts + _legend(list(series)))


def _steps(values: Sequence[float]) -> list[tuple[float, float]]:
    ranked = sorted(values)
    points = []
    for i, value in enumerate(ranked):
        points += [(value, i / len(ranked)), (value, (i + 1) / len(ranked))]
    return points


class _Frame:
    """Where a value lies in the picture. Both axes begin at 0."""

    def __init__(self, points: Points, marks: Sequence[float]) -> None:
        self._max_x = max([1e-9, *(a for a, _ in points), *marks])
        self._max_y = max([1e-9, *(b for _, b in points)])

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / self._max_x

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self._max_y

    def axes(self, title: str, x: str, y: str) -> str:
        """The title, both axes with five marks each, and what they count."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [f'<text x="{LEFT}" y="15" font-weight="bold">{escape(title)}</text>']
        parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#888"/>')
        for i in range(5):
            a, b = self._max_x * i / 4, self._max_y * i / 4
            parts.append(f'<text x="{self.x(a):.1f}" y="{bottom + 14}" text-anchor="middle">{a:.3g}</text>')
            parts.append(f'<text x="{LEFT - 5}" y="{self.y(b) + 4:.1f}" text-anchor="end">{b:.3g}</text>')
        parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
        parts.append(f'<text x="12" y="{TOP - 6}" fill="#555">{escape(y)}</text>')
        return "".join(parts)


def _legend(names: Sequence[str]) -> list[str]:
    return [
        f'<text x="{WIDTH - RIGHT}" y="{15 + 13 * i}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
        for i, (colour, name) in enumerate(zip(COLOURS, names, strict=False))
    ]


def _svg(parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" font-size="11" font-family="sans-serif">'
    return head + "".join(parts) + "</svg>"
