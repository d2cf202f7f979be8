"""Results as JUnit XML, which every CI reads, as one HTML page with plots, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any
from xml.etree import ElementTree

from cluster.harness.plots import Points, distribution, scatter
from cluster.harness.run import ScenarioResult, StepResult

STYLE = """
body{font:15px/1.45 sans-serif;max-width:1320px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.passed{color:#2e7d4f}.failed{color:#b00020}
pre{background:#f7eeee;padding:.6em;white-space:pre-wrap}svg{margin:.5em 1em .5em 0;border:1px solid #eee}
"""


def junit(results: Sequence[ScenarioResult]) -> str:
    """A suite for each scenario, a case for each step; a scenario that could not run to its end has an error."""
    root = ElementTree.Element("testsuites", name="tandem harness")
    for result in results:
        failed = [step for step in result.steps if step.broken_rules]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=result.name,
            tests=str(len(result.steps) + bool(result.error)),
            failures=str(len(failed)),
            errors=str(int(bool(result.error))),
            time=f"{result.duration_s:.3f}",
        )
        for step in result.steps:
            case = _case(suite, result, step.name, step.duration_s)
            if step.broken_rules:
                node = ElementTree.SubElement(case, "failure", message=_clean(step.broken_rules[0]))
                node.text = _clean("\n".join(step.broken_rules))
            ElementTree.SubElement(case, "system-out").text = _clean(summary(step))
        if result.error:
            case = _case(suite, result, "runs to its end", 0.0)
            ElementTree.SubElement(case, "error", message=_clean(result.error))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, result: ScenarioResult, name: str, duration_s: float) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=result.name, name=name, time=f"{duration_s:.3f}")


def _clean(text: str) -> str:
    """Without characters that XML cannot hold: answers of a model may have any."""
    return "".join(c if c in "\t\n" or " " <= c < "\ud800" or "\ue000" <= c <= "\ufffd" else "\ufffd" for c in text)


def summary(step: StepResult) -> str:
    """One line of figures."""
    text = (
        f"{len(step.samples)} requests, {step.num_failed} failed, {step.duration_s:.1f} s, "
        f"{step.tokens_per_s:.0f} tokens/s, first token {step.ttft_ms(0.5):.0f} ms (median) "
        f"{step.ttft_ms(0.95):.0f} ms (95 %)"
    )
    return text + (f"; {step.fault} at {step.fault_s:.1f} s" if step.fault else "")


def as_json(results: Sequence[ScenarioResult]) -> list[dict[str, Any]]:
    """Every figure of every request."""
    return [dataclasses.asdict(result) | {"has_passed": result.has_passed} for result in results]


def html(results: Sequence[ScenarioResult]) -> str:
    """A page without anything from elsewhere."""
    num_failed = sum(not result.has_passed for result in results)
    verdict = f'<span class="failed">{num_failed} failed</span>' if num_failed else '<span class="passed">passed</span>'
    body = "".join(map(_scenario, results))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tandem harness</title><style>{STYLE}</style>'
    return f"{head}<h1>Tandem harness: {len(results)} scenarios, {verdict}</h1>{body}</html>\n"


def _scenario(result: ScenarioResult) -> str:
    word = "passed" if result.has_passed else "failed"
    parts = [f'<h2>{escape(result.name)}: <span class="{word}">{word}</span></h2>']
    if result.error:
        parts.append(f"<pre>{escape(result.error)}</pre>")
    parts.append("<table><tr>" + "".join(f"<th>{name}</th>" for name in _COLUMNS) + "</tr>")
    parts += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in _row(step)) + "</tr>" for step in result.steps]
    parts.append("</table>")
    for step in result.steps:
        if step.broken_rules:
            parts.append(f"<h3>{escape(step.name)}</h3><pre>{escape(chr(10).join(step.broken_rules))}</pre>")
    return "".join(parts) + (_plots(result) if result.steps else "")


_COLUMNS = ("step", "", "requests", "failed", "wrong", "seconds", "tokens/s", "first token ms", "95 %", "fault")


def _row(step: StepResult) -> list[str]:
    word = "failed" if step.broken_rules else "passed"
    num_wrong = sum(bool(sample.wrong) for sample in step.samples)
    figures = (len(step.samples), step.num_failed, num_wrong, f"{step.duration_s:.1f}", f"{step.tokens_per_s:.0f}")
    times = (f"{step.ttft_ms(0.5):.0f}", f"{step.ttft_ms(0.95):.0f}")
    cells = [escape(step.name), f'<span class="{word}">{word}</span>', *map(str, figures), *times]
    return [*cells, escape(step.fault)]


def _plots(result: ScenarioResult) -> str:
    samples = [sample for step in result.steps for sample in step.samples]
    marks = [(step.fault_s, step.fault.split(",")[0].split(" drains")[0]) for step in result.steps if step.fault]
    over_time: dict[str, Points] = {
        "right": [(s.started_s, s.total_s) for s in samples if not s.wrong and not s.failure],
        "wrong or failed": [(s.started_s, s.total_s) for s in samples if s.wrong or s.failure],
    }
    first = {step.name: [1e3 * s.ttft_s for s in step.samples if s.ttft_s] for step in result.steps}
    return scatter("Requests", over_time, "seconds since the start", "seconds", marks) + distribution(
        "Time to the first token", {name: values for name, values in first.items() if values}, "milliseconds"
    )
