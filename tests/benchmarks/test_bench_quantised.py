"""The benchmark of quantised weights runs and reports all it says. How fast anything is, is not checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.bench_quantised import main


def test_every_method_is_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "quantised.json", torch.get_num_threads()
    try:
        arguments = ["--quick", "--models", "demo", "--dtypes", "bfloat16", "--threads", "1", "--json", str(out)]
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    cases = {case["quantization"]: case for case in json.loads(out.read_text(encoding="utf-8"))["cases"]}
    assert list(cases) == ["none", "int8", "int8_dynamic", "int4"]
    for case in cases.values():
        assert case["step_ms_1"] > 0 and case["step_ms_8"] > 0
        assert case["same_answers"] == case["questions"] == 3, "what the demo model has learned survives rounding"
        assert case["perplexity"] == pytest.approx(cases["none"]["perplexity"], rel=0.01)
    held = [cases[name]["weight_bytes"] for name in ("none", "int8", "int4")]
    assert held[0] > 1.8 * held[1] > 2.5 * held[2]
    assert "weights as they are stored" in capsys.readouterr().out
