"""Accuracy against tokens per forward on the shipped diffusion model, for every schedule and KV policy.

    python -m benchmarks.diffusion_quality --json FILE [--questions 500] [--plot FILE.svg] [--markdown FILE.md]

The questions are sums that training never saw; an answer counts when it is exact. Tokens are those of the answer, the
end of the turn included, forwards those of its canvas. Each schedule runs with several settings of its own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.quality_plot import quality_plot
from benchmarks.report import machine, write_json
from cluster.demo import DIFFUSION_MODEL_DIR
from cluster.llm import LLM
from examples.sums import GENERATION_LENGTH, answer_to, draw_question
from language_worker.diffusion_params import DiffusionParams
from language_worker.sampling_params import SamplingParams

RESULTS = Path(__file__).resolve().parent / "results"
SCHEDULES: dict[str, dict[str, Any]] = {  # the first word is the family
    **{f"static, {n} a step": {"schedule": "static", "steps": GENERATION_LENGTH // n} for n in (1, 2, 4, 8)},
    **{f"threshold {t}": {"schedule": "threshold", "threshold": t} for t in (0.95, 0.9, 0.7, 0.5, 0.3)},
    **{f"factor {f:g}": {"schedule": "factor", "factor": f} for f in (0.25, 1.0, 1.5)},
    **{f"entropy {e:g}": {"schedule": "entropy", "entropy_bound": e} for e in (0.1, 0.5, 2.0)},
    **{
        f"hierarchical {high:g}, {low:g}": {"schedule": "hierarchical", "threshold": high, "low_threshold": low}
        for high, low in ((0.9, 0.5), (0.9, 0.2), (0.6, 0.2))
    },
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
    parser.add_argument("--plot", type=Path, help="where the plot goes, an SVG")
    parser.add_argument("--markdown", type=Path, help="where the table goes once more, for a page")
    options = parser.parse_args(arguments)
    questions = [draw_question(rng, held_out=True) for rng in [random.Random(7)] for _ in range(options.questions)]
    cases, console = [], Console()
    table = Table("schedule", "KV policy", "exact", "tokens/forward", "forwarded tokens/token")
    with LLM(model=str(DIFFUSION_MODEL_DIR), dtype="float32", num_threads=1) as llm:
        for schedule, fields in SCHEDULES.items():
            for policy, more in POLICIES.items():
                params = DiffusionParams(block_length=options.block_length, **fields, **more)
                case = measure(llm, questions, params)
                family = schedule.replace(",", "").split()[0]
                cases.append({"schedule": schedule, "family": family, "kv_policy": policy, **case})
                figures = (case["exact"], case["tokens_per_forward"], case["forwarded_per_token"])
                row = (schedule, policy, f"{figures[0]:.1%}", f"{figures[1]:.2f}", f"{figures[2]:.1f}")
                table.add_row(*row)
                print(*row, sep=", ", flush=True)  # long work shows how far it is
    console.print(table)
    write_json(options.json, {"machine": machine(), "questions": options.questions, "cases": cases})
    if options.plot is not None:
        options.plot.write_text(quality_plot(cases), encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(markdown(cases), encoding="utf-8")
    return 0


def markdown(cases: Sequence[Mapping[str, Any]]) -> str:
    """A row for each schedule; of each policy what is exact, tokens per forward, forwarded positions per token."""
    lines = ["| Schedule | " + " | ".join(POLICIES) + " |", "|---" * (len(POLICIES) + 1) + "|"]
    for schedule in SCHEDULES:
        own = {case["kv_policy"]: case for case in cases if case["schedule"] == schedule}
        cells = [
            f"{own[policy]['exact']:.1%}, {own[policy]['tokens_per_forward']:.2f}, "
            f"{own[policy]['forwarded_per_token']:.1f}"
            for policy in POLICIES
        ]
        lines.append(f"| {schedule} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
