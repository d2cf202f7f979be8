"""The serving benchmark's report as tables: for the terminal, and as Markdown for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

SINGLE = ("model", "dtype", "threads", "engine", "TTFT ms", "ms/token", "tok/s")
CONCURRENT = ("model", "dtype", "engine", "last TTFT ms", "tok/s", "x one by one")


def tables(report: dict[str, Any]) -> list[Table]:
    """One table for single requests, one for concurrent ones."""
    single = Table(*SINGLE, title="one request")
    for row in single_rows(report):
        single.add_row(*row, style="bold" if row[3] == "ratio" else None, end_section=row[3] == "ratio")
    concurrent = Table(*CONCURRENT, title=f"{report['batch']} at once")
    for row in concurrent_rows(report):
        concurrent.add_row(*row, style="bold" if row[2] == "ratio" else None, end_section=row[2] == "ratio")
    return [single, concurrent]


def markdown(report: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    parts = ((SINGLE, single_rows(report)), (CONCURRENT, concurrent_rows(report)))
    lines = []
    for header, rows in parts:
        lines += ["", _line(header), _line(["---"] * len(header)), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def single_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """Two engines and their ratio (larger is better for us, 1 is parity) per case."""
    for case in report["cases"]:
        place = [case["model"], case["dtype"], str(case["threads"])]
        for name, figures in case["single"].items():
            yield [*place, name, *(f"{figures[key]:.1f}" for key in ("ttft_ms", "ms_per_token", "tokens_per_s"))]
        ratios = (f"x {case['ratios'][key]:.2f}" for key in ("ttft_speedup", "decode_speedup", "tokens_per_s"))
        yield [*place, "ratio", *ratios]


def concurrent_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """Ours all at once against one static batch of the same requests."""
    for case in report["cases"]:
        for name, figures in case.get("concurrent", {}).items():
            gain = figures["tokens_per_s"] / case["single"][name]["tokens_per_s"]
            cells = [f"{figures['ttft_ms']:.1f}", f"{figures['tokens_per_s']:.1f}", f"{gain:.2f}"]
            yield [case["model"], case["dtype"], name, *cells]
        if "concurrent" in case:
            gain = case["ratios"]["concurrent_over_static_batch"]
            yield [case["model"], case["dtype"], "ratio", "", f"x {gain:.2f}", ""]


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
