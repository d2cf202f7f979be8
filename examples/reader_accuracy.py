"""How often the shipped LLaDA-V answers exactly right, served: `python -m examples.reader_accuracy [--questions 500]`.

The questions are those that the other demo model is measured with: freshly drawn pictures of held-out glyphs, the three
kinds of question in turn. Each way of decoding is asked the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import LLM, DiffusionParams, SamplingParams
from cluster.demo import READER_MODEL_DIR
from examples.demo_accuracy import Asked, evaluation_set
from examples.digits import KINDS, is_right
from examples.reader import GENERATION_LENGTH

WAYS: dict[str, dict[str, Any]] = {
    "one token a step, no cache": {"schedule": "static", "kv_policy": "none"},
    "threshold 0.9, dual (the default)": {},
}


def measure(llm: LLM, asked: Sequence[Asked], params: DiffusionParams) -> dict[str, float]:
    """Share of exact answers by kind and under "all", and tokens per forward."""
    sampling = SamplingParams(max_tokens=GENERATION_LENGTH, temperature=0.0, diffusion=params)
    conversations = []
    for item in asked:
        parts = [{"type": "image", "image": item.composition.image}, {"type": "text", "text": item.question}]
        conversations.append([{"role": "user", "content": parts}])
    answers = llm.chat(conversations, sampling)
    right = [is_right(a.outputs[0].text, item.expected) for a, item in zip(answers, asked, strict=True)]
    found: dict[str, float] = {"all": sum(right) / len(asked)}
    for kind in KINDS:
        own = [is_good for is_good, item in zip(right, asked, strict=True) if item.kind == kind]
        found[kind] = sum(own) / len(own)
    num_tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return found | {"tokens_per_forward": num_tokens / sum(answer.hops["forwards"] for answer in answers)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the shipped LLaDA-V on held-out glyphs.")
    parser.add_argument("--model", type=Path, default=READER_MODEL_DIR)
    parser.add_argument("--questions", type=int, default=500)
    options = parser.parse_args()
    asked = evaluation_set(options.questions)
    table = Table("decoding", *KINDS, "all", "tokens/forward", title=f"{options.questions} questions, exact answers")
    with LLM(model=str(options.model), dtype="float32", device="cpu") as llm:
        for way, fields in WAYS.items():
            found = measure(llm, asked, DiffusionParams(**fields))
            shares = [f"{found[name]:.1%}" for name in (*KINDS, "all")]
            table.add_row(way, *shares, f"{found['tokens_per_forward']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
