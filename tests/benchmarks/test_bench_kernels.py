"""The benchmark of ops on the CPU: it covers every op, compares what is computed, and tells losses from gains."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels

MODULES = (
    "activation", "blocks", "causal_conv", "experts", "gates", "linear", "norm", "paged_attention", "pages", "quantise",
    "quantised_linear", "rotary", "sampling", "selection", "selective_scan", "varlen_attention",
)  # fmt: skip
NO_OPS = {
    # what prepares arguments once, and layouts of weights that the loader chooses
    "kv_slots", "inverse_frequencies", "rotary_cos_sin", "mrope_cos_sin", "rotary_2d_cos_sin", "rotary_table",
    "quantise_weight_int8", "quantise_weight_int4", "unpack_int4", "sums_bytes_exactly", "packed_int4_linear",
    "packed_int8_dynamic_linear", "pack_int4", "argmax_rows",
}  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Of a run with tiny sizes."""
    before, path = torch.get_num_threads(), tmp_path_factory.mktemp("kernels") / "kernels.json"
    try:
        assert bench_kernels.main(["--quick", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(before)
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("| op | torch path")
    content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _cases(report: dict[str, object]) -> list[dict[str, object]]:
    cases = report["cases"]
    assert isinstance(cases, list)
    return cases


def test_every_op_has_cases(report: dict[str, object]) -> None:
    covered = {bench_kernels.op_of(case) for case in _cases(report)}
    ops = set()
    for name in MODULES:
        module = importlib.import_module(f"kernels.{name}")
        functions = inspect.getmembers(module, inspect.isfunction)
        ops |= {n for n, f in functions if f.__module__ == module.__name__ and not n.startswith("_")}
    assert len(ops) > 40
    assert ops - NO_OPS == covered


def test_all_ways_compute_the_same(report: dict[str, object]) -> None:
    for case in _cases(report):
        difference = case["largest_difference"]
        assert difference is None or float(str(difference)) < (1e-5 if case["dtype"] == "float32" else 2e-2), case


def test_losses_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = {"dtype": "float32", "us": {"naive": 1.0, "torch": 2.0, "served": 1.0}, "x_torch": 0.5, "x_served": 1.0}
    fast = slow | {"x_torch": 2.0, "name": "quick 8"}
    found = iter([slow | {"name": "slow 1"}, fast, *[fast] * 10**3])
    monkeypatch.setattr(bench_kernels, "_measured", lambda case, rounds: next(found))
    arguments = ["--quick", "--dtypes", "float32", "--only", "rms_norm", "--json", str(tmp_path / "k.json")]
    assert bench_kernels.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "torch path slower than the composition: slow 1 float32\n" in printed
    assert "| slow | 0.50 | 1 float32 | 1.00 | 1 float32 |" in printed
