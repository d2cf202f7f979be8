"""Families against their reference's own `generate` on the CPU: prefill and decode, alone and together, in one run.

    python -m benchmarks.bench_families --json FILE [--quick] [--families nanochat]

The goal is 1.5 times the reference's tokens per second for one request, and 4 times for 16 at once.
Rounds alternate between the engines, the first of them discarded; medians are reported. The models are random, of some
25 million parameters, the prompts random ids that share nothing; requests that arrive together are one static batch for
the reference. Prefill is a prompt and its first token; decode the tokens after it. FusionTree has no reference that
decodes rightly: its own is plain torch with the scan as a Python loop (`--prompt-tokens 4096` for a long prompt).
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fusion_tree_reference import LoopingFusionTree
from benchmarks.report import machine, median, versions, write_json
from cluster import LLM, SamplingParams
from tests.tiny_fusion_tree import make_fusion_tree
from tests.tiny_nanochat import make_hf_nanochat

RESULTS = Path(__file__).resolve().parent / "results"
NUM_PROMPT, NUM_NEW = 256, 64
VOCAB = 300  # ids that prompts are drawn from
Figures = dict[str, float]
Engine = Callable[[list[list[int]]], tuple[Figures, list[list[int]]]]
# A family: a checkpoint of it that the reference can read as well.
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "nanochat": lambda folder: make_hf_nanochat(
        folder, hidden_size=512, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=8,
        intermediate_size=2048,
    ),
    "fusion_tree": lambda folder: make_fusion_tree(
        folder, hidden_size=384, num_layers=8, num_heads=6, window_size=256, global_heads=2, gate_rank=96,
        max_position_embeddings=8192,
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    console, started = Console(), time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "versions": versions(("torch", "transformers"))}
    num_prompt = options.prompt_tokens or NUM_PROMPT
    report |= {"threads": options.threads, "prompt_tokens": num_prompt, "new_tokens": NUM_NEW, "cases": []}
    for name in options.families.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder = FAMILIES[name](Path(scratch) / name)
            report["cases"] += [{"family": name, **case} for case in _measure(name, folder, options)]
    report["seconds"] = round(time.monotonic() - started, 1)
    write_json(options.json, report)
    console.print(table(report))
    console.print(f"{report['seconds']} s; JSON: {options.json}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_families", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "families.json", help="where the JSON goes")
    parser.add_argument("--families", default=",".join(FAMILIES), help=f"comma-separated: {', '.join(FAMILIES)}")
    parser.add_argument("--concurrency", default="1,16", help="comma-separated numbers of requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=0, help=f"of each prompt; 0: {NUM_PROMPT}")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of either engine")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is thrown away")
    parser.add_argument("--quick", action="store_true", help="one round: does it run, not how fast is it")
    return parser.parse_args(arguments)


def _measure(name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    widths = [int(width) for width in options.concurrency.split(",")]
    rounds = 1 if options.quick else options.rounds
    rng = random.Random(0)
    cases = []
    with LLM(model=str(folder), dtype="float32", device="cpu", num_threads=options.threads, prefix_cache=False) as llm:
        engines: dict[str, Engine] = {
            "tandem": lambda ids: _ours(llm, ids),
            "reference": REFERENCES.get(name, _reference)(folder, options.threads, llm.tokenizer.vocab_size),
        }
        for width in widths:
            runs: dict[str, list[Figures]] = {engine: [] for engine in engines}
            equal = 0
            for i in range(rounds + 1):
                ids = [[rng.randrange(VOCAB) for _ in range(options.prompt_tokens or NUM_PROMPT)] for _ in range(width)]
                answers = {}
                for engine in sorted(engines, reverse=bool(i % 2)):
                    figures, answers[engine] = engines[engine](ids)
                    if i:
                        runs[engine].append(figures)
                equal += sum(a == b for a, b in zip(answers["tandem"], answers["reference"], strict=True))
            cases.append(_case(width, runs, f"{equal}/{width * (rounds + 1)}"))
    alone = next((case["tokens_per_s"]["reference"] for case in cases if case["at_once"] == 1), None)
    for case in cases if alone else ():
        ours = case["tokens_per_s"]["tandem"]
        case["x_one_by_one"] = {kind: round(ours[kind] / alone[kind], 2) for kind in alone}
    return cases


def _case(width: int, runs: dict[str, list[Figures]], equal: str) -> dict[str, Any]:
    rates = {
        name: {kind: median([run[kind] for run in own]) for kind in ("prefill", "decode")} for name, own in runs.items()
    }
    ratios = {kind: round(rates["tandem"][kind] / rates["reference"][kind], 2) for kind in ("prefill", "decode")}
    return {"at_once": width, "tokens_per_s": rates, "x_reference": ratios, "equal_answers": equal}


def _ours(llm: LLM, ids: list[list[int]]) -> tuple[Figures, list[list[int]]]:
    def seconds(num_new: int) -> tuple[float, list[list[int]]]:
        params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
        started = time.perf_counter()
        answers = llm.generate(ids, params)
        return time.perf_counter() - started, [answer.outputs[0].token_ids for answer in answers]

    return _figures(seconds, ids)


def _reference(folder: Path, threads: int, num_token_ids: int) -> Engine:
    """transformers' own model and `generate`, all requests in one batch. num_token_ids: further ids stand for none."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    padding = list(range(num_token_ids, model.config.vocab_size)) or None

    def run(ids: list[list[int]]) -> tuple[Figures, list[list[int]]]:
        torch.set_num_threads(threads)
        inputs = torch.tensor(ids)

        def seconds(num_new: int) -> tuple[float, list[list[int]]]:
            started = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_new, do_sample=False,
                    suppress_tokens=padding,
                )  # fmt: skip
            return time.perf_counter() - started, out[:, inputs.shape[1] :].tolist()

        return _figures(seconds, ids)

    return run


def _looping(folder: Path, threads: int, num_token_ids: int) -> Engine:
    """FusionTree with a Python loop for a scan, all requests in one batch."""
    state = torch.load(folder / "checkpoint_step_40.pt", weights_only=True)
    model = LoopingFusionTree(state["config"]["model"], state["model_state_dict"])

    def run(ids: list[list[int]]) -> tuple[Figures, list[list[int]]]:
        torch.set_num_threads(threads)

        def seconds(num_new: int) -> tuple[float, list[list[int]]]:
            started, fed, past, chosen = time.perf_counter(), torch.tensor(ids), None, []
            for _ in range(num_new):
                logits, past = model.step(fed, past)
                fed = logits[:, :num_token_ids].argmax(1, keepdim=True)
                chosen.append(fed)
            return time.perf_counter() - started, torch.cat(chosen, 1).tolist()

        return _figures(seconds, ids)

    return run


REFERENCES: dict[str, Callable[[Path, int, int], Engine]] = {"fusion_tree": _looping}


def _figures(
    seconds: Callable[[int], tuple[float, list[list[int]]]], ids: list[list[int]]
) -> tuple[Figures, list[list[int]]]:
    """Tokens per second of the prompts, and of what follows the first token."""
    first, _ = seconds(1)
    whole, answers = seconds(NUM_NEW)
    decode = len(ids) * (NUM_NEW - 1) / max(whole - first, 1e-9)
    return {"prefill": sum(map(len, ids)) / first, "decode": decode}, answers


def table(report: dict[str, Any]) -> Table:
    """One row per family and number of requests at once."""
    made = Table(title=f"families, float32, {report['threads']} threads, {report['prompt_tokens']} + {NUM_NEW} tokens")
    for column in ("family", "at once", "", "tandem tok/s", "x static", "x one by one", "equal"):
        made.add_column(column, justify="left" if column in ("family", "") else "right", no_wrap=column == "family")
    for case in report["cases"]:
        for kind in ("prefill", "decode"):
            made.add_row(
                case["family"], str(case["at_once"]), kind, f"{case['tokens_per_s']['tandem'][kind]:.0f}",
                f"{case['x_reference'][kind]:.2f}", f"{case.get('x_one_by_one', {}).get(kind, '-')}",
                case["equal_answers"],
            )  # fmt: skip
    return made


if __name__ == "__main__":
    raise SystemExit(main())
