"""The quality benchmark: one question through every schedule and policy, its table, and its plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import get_args

import pytest
import torch

from benchmarks import diffusion_quality
from benchmarks.diffusion_quality import POLICIES, SCHEDULES, markdown
from benchmarks.quality_plot import quality_plot
from language_worker.diffusion_params import Schedule

SVG = "{http://www.w3.org/2000/svg}"


def _cases() -> list[dict[str, object]]:
    return [
        {
            "schedule": schedule,
            "family": schedule.replace(",", "").split()[0],
            "kv_policy": policy,
            "exact": 1 - i / 100,
            "tokens_per_forward": 1.0 + i,
            "forwarded_per_token": 9.0,
        }
        for i, schedule in enumerate(SCHEDULES)
        for policy in POLICIES
    ]


def test_the_plot_has_a_point_for_every_case_inside_its_panel() -> None:
    tree = ElementTree.fromstring(quality_plot(_cases()))
    panels = [group for group in tree.findall(f"{SVG}g") if group.get("transform")]
    assert len(panels) == len(POLICIES)
    for panel in panels:
        dots = list(panel.iter(f"{SVG}circle"))
        assert len(dots) == len(SCHEDULES)
        assert all(0 <= float(dot.attrib["cx"]) <= 380 and 0 <= float(dot.attrib["cy"]) <= 230 for dot in dots)


def test_the_table_has_a_row_for_every_schedule() -> None:
    lines = markdown(_cases()).splitlines()
    assert len(lines) == 2 + len(SCHEDULES)
    assert all(line.count("|") == len(POLICIES) + 2 for line in lines)


def test_every_schedule_is_measured() -> None:
    assert {fields["schedule"] for fields in SCHEDULES.values()} == set(get_args(Schedule))


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("static, 8 a step", "threshold 0.9")
    monkeypatch.setattr(diffusion_quality, "SCHEDULES", {name: SCHEDULES[name] for name in names})
    files = {name: tmp_path / name for name in ("json", "plot", "markdown")}
    flags = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    threads = torch.get_num_threads()
    try:
        assert diffusion_quality.main(["--questions", "2", *flags]) == 0
    finally:
        torch.set_num_threads(threads)
    cases = json.loads(files["json"].read_text())["cases"]
    assert len(cases) == 2 * len(POLICIES) and all(0 <= case["exact"] <= 1 for case in cases)
    assert files["plot"].read_text().startswith("<svg") and "threshold 0.9" in files["markdown"].read_text()
