"""The decode benchmark runs, compares like with like, and reports all it says. How fast anything is, is not checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.bench_decode import main


def test_every_figure_is_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "decode.json", torch.get_num_threads()
    arguments = ["--models", "demo", "--dtypes", "float32", "--concurrency", "1,3", "--rounds", "2", "--threads", "1"]
    try:
        assert main([*arguments, "--new-tokens", "5", "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [(case["prompts"], case["at_once"]) for case in report["cases"]] == [
        (kind, width) for kind in ("text", "image") for width in (1, 3)
    ]
    for case in report["cases"]:
        rates = case["tokens_per_s"]
        assert case["x_static_batch"] == pytest.approx(rates["tandem"] / rates["transformers"], abs=0.02)
        assert case["equal_answers"] == f"{2 * case['at_once']}/{2 * case['at_once']}", "they did the same work"
    for step in report["steps"]:
        assert step["model_ms"] > 0 and step["host_ms"] > 0
        assert step["weight_bytes"] > 2 * 1_000_000, "the text half has more than a million parameters"
    (drafts,) = report["drafts"]
    assert drafts["equal_answers"] is True and 0 <= drafts["acceptance"] <= 1
    printed = capsys.readouterr().out
    assert "a decode step" in printed and "prompt lookup" in printed and str(out) in printed.replace("\n", "")
