"""The benchmark of the arrived prefix runs, compares like with like, and reports all it says. No speed is checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.bench_overlap import main


def test_every_pace_is_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "overlap.json", torch.get_num_threads()
    arguments = ["--models", "demo", "--dtypes", "float32", "--rows", "200", "--block-size", "16", "--threads", "1"]
    try:
        assert main([*arguments, "--quick", "--transfers", "0.5,2", "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [case["transfer"] for case in cases] == [0.5, 2.0]
    for case in cases:
        assert case["equal_answers"] is True, "they did the same work"
        assert case["rows"] == 200 and case["waiting_ms"] > case["transfer_ms"]
        gained = case["waiting_ms"] - case["overlapping_ms"]
        assert case["hidden_share"] == pytest.approx(gained / case["transfer_ms"], abs=0.02)
    assert "first token of one image prompt" in capsys.readouterr().out
