"""Weights in 8 and 4 bits against full ones, on the CPU: bytes, time of a decode step, and what becomes of answers.

    python -m benchmarks.bench_quantised --json FILE [--quick] [--models demo,100m] [--dtypes bfloat16,float32]

Steps of all methods take turns within each round; medians are reported. Answers are compared on the demo model alone,
which has been trained: how many of the shipped questions get the same answer, and the perplexity of the full model's
answers, each read after its own image and question.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.decode_limits import num_bytes
from benchmarks.report import machine, median, versions, write_json
from benchmarks.serving_models import BenchModel, BenchRequest, load_model
from cluster import LLM, SamplingParams
from kernels.quantised_matrix import QUANTIZATIONS
from language_worker.api import GenerateRequest
from language_worker.config import EngineConfig
from language_worker.engine import Engine
from language_worker.engine_builder import build_engine

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("model", "dtype", "weights", "MB", "1: ms (x)", "8: ms (x)", "same", "perpl. x")
WARM_STEPS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_quantised", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "quantised.json", help="where the JSON goes")
    parser.add_argument("--models", default="demo,100m", help="comma-separated: demo, 100m")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="comma-separated torch dtypes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--steps", type=int, default=30, help="measured decode steps of each method")
    parser.add_argument("--questions", type=int, default=90, help="shipped questions, each image changed a little")
    parser.add_argument("--quick", action="store_true", help="few steps and questions: does it run")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.questions = 3, 3
    console, report = Console(), {"machine": machine(), "versions": versions(("torch", "numpy")), "cases": []}
    for name in options.models.split(","):
        model = load_model(name, RESULTS / "models", options.questions)
        for dtype in options.dtypes.split(","):
            with console.status(f"{name} {dtype}"):
                report["cases"] += _cases(model, dtype, options)
    write_json(options.json, report)
    console.print(table(report))
    console.print(f"JSON: {options.json}")
    return 0


def _cases(model: BenchModel, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One case for each method, full weights first."""
    steps = {width: _steps(model, dtype, width, options) for width in (1, 8)}
    answers: dict[str, list[str]] = {}
    cases = []
    for method in QUANTIZATIONS:
        case = {"model": model.name, "dtype": dtype, "quantization": method, "weight_bytes": steps[1][method][1]}
        for width, by_method in steps.items():
            case[f"step_ms_{width}"] = round(1e3 * by_method[method][0], 3)
            case[f"x_full_{width}"] = round(by_method["none"][0] / by_method[method][0], 2)
        if model.name == "demo":
            answers[method], perplexity = _answers(model, dtype, method, answers.get("none"), options.threads)
            case["same_answers"] = sum(map(str.__eq__, answers[method], answers["none"]))
            case |= {"questions": len(model.requests), "perplexity": round(perplexity, 5)}
        cases.append(case)
    return cases


def _steps(model: BenchModel, dtype: str, width: int, options: argparse.Namespace) -> dict[str, tuple[float, int]]:
    """{method: (median seconds of a decode step of `width` sequences, bytes of weights)}, the methods taking turns."""
    engines = {method: _engine(model, dtype, method, width, options) for method in QUANTIZATIONS}
    seconds: dict[str, list[float]] = {method: [] for method in engines}
    for i in range(WARM_STEPS + options.steps):
        for method, engine in engines.items():
            started = time.perf_counter()
            engine.step()
            if i >= WARM_STEPS:
                seconds[method].append(time.perf_counter() - started)
    return {
        method: (median(seconds[method]), sum(map(num_bytes, engine.runner.model.parameters().values())))
        for method, engine in engines.items()
    }


def _engine(model: BenchModel, dtype: str, method: str, width: int, options: argparse.Namespace) -> Engine:
    """An engine whose sequences have their first token and go on for as long as they are measured."""
    config = EngineConfig(dtype=dtype, quantization=method, num_threads=options.threads, kv_cache_tokens=8192)  # type: ignore[arg-type]
    engine = build_engine(model.folder, config)
    sampling = SamplingParams(temperature=0.0, max_tokens=options.steps + 3 * WARM_STEPS, ignore_eos=True)
    for i in range(width):
        prompt = tuple((7 * i + j * j) % 200 for j in range(40))
        engine.submit(GenerateRequest(request_id=f"r{i}", prompt_token_ids=prompt, sampling=sampling))
    while engine.stats()["generation_tokens_total"] < width:
        engine.step()
    return engine


def _answers(
    model: BenchModel, dtype: str, method: str, wanted: list[str] | None, threads: int
) -> tuple[list[str], float]:
    """Greedy answers, and the perplexity of `wanted` (None: of these answers) after their questions."""
    with LLM(str(model.folder), dtype=dtype, quantization=method, num_threads=threads) as llm:
        outputs = llm.generate([_prompt(r) for r in model.requests], SamplingParams(max_tokens=24, temperature=0.0))
        texts = [output.outputs[0].text for output in outputs]
        told = texts if wanted is None else wanted
        tails = [_prompt(r, answer) for r, answer in zip(model.requests, told, strict=True)]
        read = llm.generate(tails, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
        total, count = 0.0, 0
        for before, after in zip(outputs, read, strict=True):
            answer = (after.prompt_logprobs or [])[before.num_prompt_tokens :]
            total -= sum(entry.logprob for entry in answer if entry is not None)
            count += len(answer)
    return texts, math.exp(total / max(1, count))


def _prompt(request: BenchRequest, answer: str = "") -> dict[str, Any]:
    images = [] if request.image is None else [request.image]
    return {"prompt": request.prompt + answer, "images": images}


def table(report: dict[str, Any]) -> Table:
    """A row for each case."""
    shown = Table(*COLUMNS, title="weights as they are stored, and a decode step of 1 and of 8 sequences")
    full = {(c["model"], c["dtype"]): c.get("perplexity") for c in report["cases"] if c["quantization"] == "none"}
    for case in report["cases"]:
        cells: list[Any] = [case["model"], case["dtype"], case["quantization"], f"{case['weight_bytes'] / 1e6:.1f}"]
        cells += [f"{case[f'step_ms_{width}']:.2f} ({case[f'x_full_{width}']})" for width in (1, 8)]
        if "perplexity" in case:
            ratio = case["perplexity"] / full[case["model"], case["dtype"]]
            cells += [f"{case['same_answers']}/{case['questions']}", f"{ratio:.4f}"]
        shown.add_row(*map(str, cells))
    return shown


if __name__ == "__main__":
    sys.exit(main())
