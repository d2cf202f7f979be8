"""The benchmark of random arrivals runs, compares like with like, and counts right. No speed is checked."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks.arrival_traffic import Answer, Arrival, poisson_arrivals
from benchmarks.bench_arrivals import figures, main
from benchmarks.serving_models import text_requests


def test_every_load_is_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "arrivals.json", torch.get_num_threads()
    arguments = ["--quick", "--models", "demo", "--dtypes", "float32", "--loads", "1,5", "--threads", "1"]
    try:
        assert main([*arguments, "--max-at-once", "4", "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text(encoding="utf-8"))
    slow, fast = report["cases"]
    assert [case["load"] for case in (slow, fast)] == [1.0, 5.0]
    assert fast["requests_per_s"] == pytest.approx(5 * slow["requests_per_s"], rel=0.02)
    for case in report["cases"]:
        assert case["equal_answers"] == "6/6", "they did the same work"
        ours, static = case["tandem"], case["static"]
        assert case["x_throughput"] == pytest.approx(ours["tokens_per_s"] / static["tokens_per_s"], abs=0.02)
        assert case["x_ttft_p90"] == pytest.approx(static["ttft_p90_ms"] / ours["ttft_p90_ms"], abs=0.02)
        for engine in (ours, static):
            assert 0 < engine["ttft_p50_ms"] <= engine["ttft_p90_ms"] <= engine["answer_p90_ms"]
    assert "Poisson arrivals" in capsys.readouterr().out


def test_a_trace_has_the_rate_and_the_lengths_that_were_asked_for() -> None:
    requests = text_requests(2000)
    slow, fast = (poisson_arrivals(requests, rate, (16, 256), seed=3) for rate in (2.0, 20.0))
    assert slow[0].at_s == 0 and slow[-1].at_s / 2000 == pytest.approx(0.5, rel=0.1)
    gaps = torch.tensor([b.at_s - a.at_s for a, b in itertools.pairwise(slow)])
    assert float(gaps.std() / gaps.mean()) == pytest.approx(1.0, abs=0.1), "exponential: as wide as its mean"
    assert slow[-1].at_s == pytest.approx(10 * fast[-1].at_s)
    assert [a.new_tokens for a in slow] == [a.new_tokens for a in fast]
    assert {min(a.new_tokens for a in slow), max(a.new_tokens for a in slow)} == {16, 256}
    assert {a.at_s for a in poisson_arrivals(requests[:5], 0.0, (1, 2), seed=0)} == {0.0}


def test_figures_count_from_each_arrival_and_to_the_last_token() -> None:
    (request,) = text_requests(1)
    trace = [Arrival(at_s=float(i), request=request, new_tokens=10) for i in range(11)]
    answers = [Answer(first_s=0.1 * (i + 1), last_s=2.0, token_ids=(1,) * 10) for i in range(11)]
    assert figures(trace, answers) == {
        "tokens_per_s": pytest.approx(110 / 12, abs=0.1),
        "ttft_p50_ms": 600.0,
        "ttft_p90_ms": 1000.0,
        "answer_p90_ms": 2000.0,
    }


@pytest.mark.parametrize("span", ["0-5", "9-3"])
def test_lengths_that_are_no_range_are_refused(span: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--new-tokens", span])
    assert "use FEWEST-MOST" in capsys.readouterr().err
