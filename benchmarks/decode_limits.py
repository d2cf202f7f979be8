"""What bounds a decode step: the memory that it must read, and what the engine does around the model.

Both are taken in the run that they are compared with.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.report import median
from benchmarks.serving_models import BenchModel
from kernels.linear import Weight
from language_worker.api import GenerateRequest
from language_worker.config import EngineConfig
from language_worker.engine import Engine
from language_worker.engine_builder import build_engine
from language_worker.plan import StepPlan
from language_worker.sampling_params import SamplingParams
from language_worker.step_logits import StepLogits

READ_BYTES = 512 << 20  # larger than any cache
SAMPLING: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
    "greedy": {"temperature": 0.0},
}


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes per second that `threads` torch threads read from memory: the best of some sums over a large tensor."""
    torch.set_num_threads(threads)
    values = torch.zeros(READ_BYTES // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - started)
    return READ_BYTES / best


def step_figures(model: BenchModel, dtype: str, threads: int, batch: int) -> dict[str, Any]:
    """Medians over the decode steps of `batch` sequences: ms in the model's step, ms around it (scheduler, sampler,
    detokeniser, text; greedy, and with every sequence drawn from a nucleus), and the bytes of weights that a step
    reads."""
    engine = build_engine(model.folder, EngineConfig(dtype=dtype, num_threads=threads, max_num_seqs=max(64, batch)))  # type: ignore[arg-type]
    inside: list[float] = []
    run = engine.runner.run

    def timed(plan: StepPlan) -> StepLogits:
        started = time.perf_counter()
        step = run(plan)
        inside.append(time.perf_counter() - started)
        return step

    engine.runner.run = timed  # type: ignore[method-assign]
    around: dict[str, float] = {}
    for name, sampling in SAMPLING.items():
        whole = _decode(engine, model, batch, inside, sampling)
        around[name] = median([total - part for total, part in zip(whole, inside, strict=True)])
    parameters = engine.runner.model.parameters()
    return {
        "batch": batch,
        "model_ms": round(1e3 * median(inside), 3),
        "host_ms": round(1e3 * around["greedy"], 3),
        "sampled_host_ms": round(1e3 * around["sampled"], 3),
        "weight_bytes": sum(map(num_bytes, parameters.values())),
    }


def num_bytes(weight: Weight) -> int:
    """What a step of one sequence reads of a weight in whatever form."""
    return weight.numel() * weight.element_size() if isinstance(weight, torch.Tensor) else weight.num_bytes


def _decode(
    engine: Engine, model: BenchModel, batch: int, inside: list[float], sampling: dict[str, Any]
) -> list[float]:
    """Seconds of each step with every sequence decoding; `inside` is left with the same steps."""
    params = SamplingParams(**sampling, max_tokens=model.new_tokens, ignore_eos=True)
    before = engine.stats()["generation_tokens_total"]
    for i in range(batch):
        prompt = tuple((7 * i + j * j) % 200 for j in range(40))
        engine.submit(GenerateRequest(request_id=f"r{i}", prompt_token_ids=prompt, sampling=params))
    while engine.stats()["generation_tokens_total"] < before + batch:
        engine.step()
    inside.clear()
    whole: list[float] = []
    while engine.scheduler.running:
        started = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - started)
    return whole
