"""Accuracy against tokens per forward as one SVG: a panel for each KV policy, a line for each schedule.

Figures in, text out; no file is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 380, 230, 2
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 26, 34
LEGEND_HEIGHT = 26
COLOURS = ("#2563a8", "#c2571a", "#2e7d4f", "#8a3ea8", "#a8912b")
TICKS = 4


def quality_plot(cases: Sequence[Mapping[str, Any]]) -> str:
    """cases: maps of `family`, `kv_policy`, `exact` (a share) and `tokens_per_forward`."""
    families = list(dict.fromkeys(case["family"] for case in cases))
    policies = list(dict.fromkeys(case["kv_policy"] for case in cases))
    reach = max(case["tokens_per_forward"] for case in cases) * 1.05
    floor = min(0.9, min(case["exact"] for case in cases))
    parts = [_legend(families)]
    for i, policy in enumerate(policies):
        left, top = i % COLUMNS * PANEL_WIDTH, LEGEND_HEIGHT + i // COLUMNS * PANEL_HEIGHT
        own = [case for case in cases if case["kv_policy"] == policy]
        parts.append(f'<g transform="translate({left} {top})">{_panel(policy, families, own, reach, floor)}</g>')
    width = PANEL_WIDTH * min(COLUMNS, len(policies))
    height = LEGEND_HEIGHT + PANEL_HEIGHT * -(-len(policies) // COLUMNS)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    style = 'font-size="11" font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>'
    return head + style + "".join(parts) + "</svg>\n"


def _panel(title: str, families: Sequence[str], cases: Sequence[Mapping[str, Any]], reach: float, floor: float) -> str:
    right, bottom = PANEL_WIDTH - RIGHT, PANEL_HEIGHT - BOTTOM

    def place(tokens: float, share: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * tokens / reach, bottom - (bottom - TOP) * (share - floor) / (1 - floor)

    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">KV policy: {escape(title)}</text>']
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#888"/>')
    for i in range(TICKS + 1):
        tokens, share = reach * i / TICKS, floor + (1 - floor) * i / TICKS
        x, y = place(tokens, share)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tokens:.1f}</text>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 28}" text-anchor="middle">tokens per forward</text>')
    for colour, family in zip(COLOURS, families, strict=False):
        found = [case for case in cases if case["family"] == family]
        points = sorted(place(case["tokens_per_forward"], case["exact"]) for case in found)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
        parts.append(f'<g stroke="{colour}" fill="{colour}"><polyline fill="none" points="{path}"/>{dots}</g>')
    return "".join(parts)


def _legend(families: Sequence[str]) -> str:
    words = (
        f'<text x="{LEFT + 110 * i}" y="16" fill="{colour}">&#9679; {escape(family)}</text>'
        for i, (colour, family) in enumerate(zip(COLOURS, families, strict=False))
    )
    return "".join(words)
