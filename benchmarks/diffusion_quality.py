"""Accuracy against tokens per forward on the shipped diffusion model, for every schedule and KV policy.

    python -m benchmarks.diffusion_quality --json FILE [--questions 500]

The questions are sums that training never saw; an answer counts when it is exact. Tokens are those of the answer, the
end of the turn included, forwards those of its canvas.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import machine, write_json
from cluster.demo import DIFFUSION_MODEL_DIR
from cluster.llm import LLM
from examples.sums import GENERATION_LENGTH, answer_to, draw_question
from language_worker.api import SamplingParams
from language_worker.diffusion_params import DiffusionParams

RESULTS = Path(__file__).resolve().parent / "results"
SCHEDULES: dict[str, dict[str, Any]] = {
    "static, 1 a step": {"schedule": "static"},
    "static, 2 a step": {"schedule": "static", "steps": GENERATION_LENGTH // 2},
    "static, 4 a step": {"schedule": "static", "steps": GENERATION_LENGTH // 4},
    "threshold 0.9": {"schedule": "threshold", "threshold": 0.9},
    "threshold 0.7": {"schedule": "threshold", "threshold": 0.7},
    "factor 1": {"schedule": "factor", "factor": 1.0},
    "entropy 0.1": {"schedule": "entropy", "entropy_bound": 0.1},
    "hierarchical 0.9, 0.5": {"schedule": "hierarchical", "threshold": 0.9, "low_threshold": 0.5},
}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {"kv_policy": "none"},
    "prefix": {"kv_policy": "prefix"},
    "dual": {"kv_policy": "dual"},
    "dual, refresh 4": {"kv_policy": "dual", "refresh_interval": 4},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diffusion_quality", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "diffusion_quality.json", help="where the JSON goes")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--block-length", type=int, default=8)
    options = parser.parse_args(arguments)
    questions = [draw_question(rng, held_out=True) for rng in [random.Random(7)] for _ in range(options.questions)]
    cases, console = [], Console()
    table = Table("schedule", "KV policy", "exact", "tokens/forward", "forwarded tokens/token")
    with LLM(model=str(DIFFUSION_MODEL_DIR), dtype="float32", num_threads=1) as llm:
        for schedule, fields in SCHEDULES.items():
            for policy, more in POLICIES.items():
                params = DiffusionParams(block_length=options.block_length, **fields, **more)
                case = measure(llm, questions, params)
                cases.append({"schedule": schedule, "kv_policy": policy, **case})
                figures = (case["exact"], case["tokens_per_forward"], case["forwarded_per_token"])
                row = (schedule, policy, f"{figures[0]:.1%}", f"{figures[1]:.2f}", f"{figures[2]:.1f}")
                table.add_row(*row)
                print(*row, sep=", ", flush=True)  # long work shows how far it is
    console.print(table)
    write_json(options.json, {"machine": machine(), "questions": options.questions, "cases": cases})
    return 0


def measure(llm: LLM, questions: Sequence[str], params: DiffusionParams) -> dict[str, float]:
    """Share of exact answers, and what they cost."""
    sampling = SamplingParams(max_tokens=GENERATION_LENGTH, temperature=0.0, diffusion=params)
    answers = llm.chat([[{"role": "user", "content": question}] for question in questions], sampling)
    num_right = sum(a.outputs[0].text == answer_to(q) for a, q in zip(answers, questions, strict=True))
    num_tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    num_forwards = sum(answer.hops["forwards"] for answer in answers)
    return {
        "exact": num_right / len(questions),
        "tokens_per_forward": num_tokens / num_forwards,
        "forwarded_per_token": sum(answer.hops["forwarded_tokens"] for answer in answers) / num_tokens,
    }


if __name__ == "__main__":
    raise SystemExit(main())
