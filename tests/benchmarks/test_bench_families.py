"""The benchmark of the families runs, compares like with like, and reports all it says. No speed is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import bench_families, bench_scan
from tests.tiny_fusion_tree import make_fusion_tree
from tests.tiny_nanochat import make_hf_nanochat


@pytest.mark.parametrize(("family", "make"), [("nanochat", make_hf_nanochat), ("fusion_tree", make_fusion_tree)])
def test_every_family_is_measured_and_reported(
    family: str,
    make: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_families, "FAMILIES", {family: make})
    monkeypatch.setattr(bench_families, "NUM_NEW", 4)
    monkeypatch.setattr(bench_families, "NUM_PROMPT", 8)
    out, threads = tmp_path / "families.json", torch.get_num_threads()
    arguments = ["--quick", "--threads", "1", "--concurrency", "1,3", "--families", family, "--json", str(out)]
    try:
        assert bench_families.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [(case["family"], case["at_once"]) for case in cases] == [(family, 1), (family, 3)]
    for case in cases:
        assert case["equal_answers"] == f"{2 * case['at_once']}/{2 * case['at_once']}", "they did the same work"
        for kind in ("prefill", "decode"):
            ours, theirs = (case["tokens_per_s"][name][kind] for name in ("tandem", "reference"))
            assert case["x_reference"][kind] == pytest.approx(ours / theirs, abs=0.02)
            assert case["x_one_by_one"][kind] == pytest.approx(
                ours / cases[0]["tokens_per_s"]["reference"][kind], abs=0.02
            )
    assert family in capsys.readouterr().out


def test_the_scan_is_measured_against_a_loop(tmp_path: Path) -> None:
    out, threads = tmp_path / "scan.json", torch.get_num_threads()
    try:
        assert bench_scan.main(["--quick", "--channels", "8,20", "--threads", "1", "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [case["channels"] for case in cases] == [8, 20]
    assert all(case["largest_difference"] < 1e-3 and case["x_loop"] > 0 for case in cases)
