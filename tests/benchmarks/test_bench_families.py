"""The benchmarks of families and of the scan run, compare like with like, and report it all. No speed is checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_families, bench_scan
from benchmarks.family_models import FAMILIES
from tests.tiny_families import FAMILIES as TESTED
from tests.tiny_fusion_tree import make_fusion_tree
from tests.tiny_minimind import make_minimind
from tests.tiny_minimind_v import make_minimind_v
from tests.tiny_nanochat import make_native_nanochat
from tests.tiny_qwen3_vl import make_qwen3_vl
from tests.tiny_text_models import make_text_model
from tests.tiny_tokenizer import NUM_TOKENS

TINY: dict[str, Callable[[Path], Any]] = {  # one of each kind of reference
    "llama": lambda folder: make_text_model(folder, "llama", vocab_size=NUM_TOKENS),
    "minimind-2-moe": lambda folder: ("2-moe", make_minimind(folder, "2-moe", "pth")),
    "minimind-v": lambda folder: make_minimind_v(folder, "siglip"),
    "qwen3_vl": make_qwen3_vl,
    "nanochat-4": lambda folder: make_native_nanochat(folder, 4, window_pattern="SL"),
    "fusion_tree": make_fusion_tree,
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", list(TINY))
def test_every_family_is_measured_and_reported(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench_families.FAMILIES, family, dataclasses.replace(FAMILIES[family], make=TINY[family]))
    monkeypatch.setattr(bench_families, "NUM_NEW", 4)
    monkeypatch.setattr(bench_families, "NUM_PROMPT", 8)
    monkeypatch.setattr(bench_families, "PIXELS", 64)
    out = tmp_path / "families.json"
    arguments = ["--quick", "--threads", "1", "--concurrency", "1,3", "--families", family, "--json", str(out)]
    assert bench_families.main(arguments) == 0
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [(case["family"], case["at_once"]) for case in cases] == [(family, 1), (family, 3)]
    for case in cases:
        assert case["against"] == FAMILIES[family].against
        assert case["equal_answers"] == f"{2 * case['at_once']}/{2 * case['at_once']}", "they did the same work"
        for kind in ("prefill", "decode"):
            ours, theirs = (case["tokens_per_s"][name][kind] for name in ("tandem", "reference"))
            assert case["x_reference"][kind] == pytest.approx(ours / theirs, abs=0.02)
            assert case["x_one_by_one"][kind] == pytest.approx(
                ours / cases[0]["tokens_per_s"]["reference"][kind], abs=0.02
            )
    assert family in capsys.readouterr().out


def test_no_family_is_left_out() -> None:
    """Every family that is tested is measured, in one of its layouts."""
    for name in TESTED:
        assert any(name == known or name.startswith(f"{known}-") for known in FAMILIES), name


def test_the_scan_is_measured_against_a_loop(tmp_path: Path) -> None:
    out = tmp_path / "scan.json"
    arguments = ["--quick", "--channels", "8,20", "--widths", "32", "--threads", "1", "--json", str(out)]
    assert bench_scan.main(arguments) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [case["channels"] for case in report["cases"]] == [8, 20]
    assert all(case["largest_difference"] < 1e-3 and case["x_loop"] > 0 for case in report["cases"])
    (whole,) = report["models"]
    assert (whole["width"], whole["tokens"], whole["equal_answers"]) == (32, 256, True)
    for name, ratio in (("loop", "x_loop"), ("both", "x_both")):
        assert whole[ratio] == pytest.approx(whole["seconds"][name] / whole["seconds"]["ours"], abs=0.06)
