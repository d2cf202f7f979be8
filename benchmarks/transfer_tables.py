"""The transfer benchmark's figures: medians, ratios within rounds, goals; for the terminal and as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.table import Table

from benchmarks.report import median

HEADER = (
    "path",
    "GB/s",
    "x TCP",
    "x memcpy",
    "x plain",
    "CPU-s/GB",
    "send",
    "recv",
    "1024: ms",
    "x TCP",
    "+open",
    "8192: ms",
)
GOAL_HEADER = ("goal", "is to be", "is")

Body = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """One figure that is promised. value(paths, ratio) may raise KeyError: the path was not measured."""

    text: str
    at_least: bool
    limit: float
    value: Callable[[Body], float]

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


GOALS = (
    Goal(
        text="ZeroMQ with headers, resume and checksums, in raw TCP's rate",
        at_least=True,
        limit=0.95,
        value=lambda paths: paths["streams-tcp"]["x_tcp"],
    ),
    Goal(
        text="the same, processor seconds of both sides per GB",
        at_least=False,
        limit=0.40,
        value=lambda paths: paths["streams-tcp"]["cpu_s_per_gb"],
    ),
    Goal(
        text="a request of 1024 tokens, in raw TCP's time",
        at_least=False,
        limit=1.1,
        value=lambda paths: paths["streams-tcp"]["latency_x_tcp"],
    ),
    Goal(
        text="encrypted, in the rate of plain",
        at_least=True,
        limit=0.8,
        value=lambda paths: paths["streams-encrypted"]["x_plain"],
    ),
    Goal(
        text="shared memory, one copy, a seal per slot, in memcpy's rate",
        at_least=True,
        limit=0.75,
        value=lambda paths: paths["streams-shm"]["x_memcpy"],
    ),
    Goal(
        text="8192 tokens handed over without a copy, ms",
        at_least=False,
        limit=0.5,
        value=lambda paths: paths["streams-in-place"]["handover_ms"],
    ),
)


def summarise(rounds: list[Body]) -> Body:
    """Medians per path, and every goal that was measured."""
    paths = {path: _path_summary(rounds, path) for path in (rounds[0] if rounds else {})}
    goals = []
    for goal in GOALS:
        try:
            value = goal.value(paths)
        except KeyError:
            continue
        limit = f"{'>=' if goal.at_least else '<='} {goal.limit:g}"
        goals.append({"goal": goal.text, "limit": limit, "value": round(value, 3), "met": goal.met(value)})
    return {"paths": paths, "goals": goals}


def _path_summary(rounds: list[Body], path: str) -> Body:
    if "handover" in rounds[0][path]:
        return {"handover_ms": round(1e3 * median([median(figures[path]["handover"]) for figures in rounds]), 4)}
    keys = ("gb_per_s", "cpu_s_per_gb", "sender_cpu_s_per_gb", "receiver_cpu_s_per_gb")
    summary: Body = {key: median([figures[path][key] for figures in rounds]) for key in keys}
    for peer, name in (("tcp", "x_tcp"), ("memcpy", "x_memcpy"), ("streams-tcp", "x_plain")):
        if peer in rounds[0]:
            summary[name] = median([figures[path]["gb_per_s"] / figures[peer]["gb_per_s"] for figures in rounds])
    if "latency" in rounds[0][path]:
        latencies = [median(figures[path]["latency"]) for figures in rounds]
        summary["latency_ms"] = 1e3 * median(latencies)
        summary["opened_too_ms"] = 1e3 * median([median(figures[path]["cold"]) for figures in rounds])
        if "tcp" in rounds[0]:
            base = [median(figures["tcp"]["latency"]) for figures in rounds]
            summary["latency_x_tcp"] = median([ours / raw for ours, raw in zip(latencies, base, strict=True)])
    return {name: round(value, 4) for name, value in summary.items()}


def tables(report: Body) -> list[Table]:
    """The figures, then the goals."""
    figures = Table(*HEADER, title=f"blocks of {report['block_bytes']:,} bytes, medians of {report['rounds']} rounds")
    for row in _rows(report):
        figures.add_row(*row)
    goals = Table(*GOAL_HEADER, title="goals")
    for goal in report["goals"]:
        goals.add_row(goal["goal"], goal["limit"], f"{goal['value']:g}", style=None if goal["met"] else "bold red")
    return [figures, goals]


def markdown(report: Body) -> str:
    """Both tables as Markdown."""
    goals = [[goal["goal"], goal["limit"], f"{goal['value']:g}"] for goal in report["goals"]]
    lines = []
    for header, rows in ((HEADER, _rows(report)), (GOAL_HEADER, goals)):
        lines += ["", _line(header), _line(["---"] * len(header)), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _rows(report: Body) -> list[list[str]]:
    return [
        [
            path,
            _cell(figures, "gb_per_s"),
            _cell(figures, "x_tcp"),
            _cell(figures, "x_memcpy"),
            _cell(figures, "x_plain") if path.startswith("streams") else "",
            _cell(figures, "cpu_s_per_gb", 3),
            _cell(figures, "sender_cpu_s_per_gb", 3),
            _cell(figures, "receiver_cpu_s_per_gb", 3),
            _cell(figures, "latency_ms"),
            _cell(figures, "latency_x_tcp"),
            _cell(figures, "opened_too_ms"),
            _cell(figures, "handover_ms"),
        ]
        for path, figures in report["paths"].items()
    ]


def _cell(figures: Body, key: str, digits: int = 2) -> str:
    return f"{figures[key]:.{digits}f}" if key in figures else ""


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
