"""Families against their reference's own `generate` on the CPU: prefill and decode, alone and together, in one run.

    python -m benchmarks.bench_families --json FILE [--quick] [--families nanochat,llama]

The goal is 1.5 times the reference's tokens per second for one request, and 4 times for 16 at once.
Rounds alternate between the engines, the first of them discarded; medians are reported. Prompts are random ids that
share nothing, and an image where the family sees; requests that arrive together are one static batch for the reference.
Prefill is a prompt and its first token, its image included; decode the tokens after it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.family_models import FAMILIES, TRANSFORMERS, Family
from benchmarks.family_references import Answer, Request
from benchmarks.report import machine, median, versions, write_json
from cluster import LLM, SamplingParams
from cluster.prompts import image_bytes
from tests.tiny_models import random_image

RESULTS = Path(__file__).resolve().parent / "results"
NUM_PROMPT, NUM_NEW = 128, 48
VOCAB = 300  # ids that prompts are drawn from
PIXELS = 224  # of an image's sides
KINDS = ("prefill", "decode")
Figures = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    console, started = Console(), time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "versions": versions(("torch", "transformers"))}
    num_prompt = options.prompt_tokens or NUM_PROMPT
    report |= {"threads": options.threads, "prompt_tokens": num_prompt, "new_tokens": NUM_NEW, "cases": []}
    for name in options.families.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            place = {"family": name, "against": FAMILIES[name].against}
            found = _measure(FAMILIES[name], Path(scratch) / name, options)
            report["cases"] += [{**place, **case} for case in found]
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
    parser.add_argument("--prompt-tokens", type=int, default=0, help=f"of each prompt's text; 0: {NUM_PROMPT}")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of either engine")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is thrown away")
    parser.add_argument("--quick", action="store_true", help="one round: does it run, not how fast is it")
    return parser.parse_args(arguments)


def _measure(family: Family, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases of one family, each width in turn."""
    torch.set_num_threads(options.threads)
    made = family.make(folder)
    reference = family.reference(folder, made)
    rng = random.Random(0)
    threads = {"num_threads": options.threads}
    path = made if isinstance(made, Path) else folder  # some layouts keep the weights further in
    with LLM(
        model=str(path), dtype="float32", device="cpu", embedding={"cache_tokens": 0, **threads},
        language={"prefix_cache": False, **threads},
    ) as llm:  # fmt: skip
        engines: dict[str, Answer] = {"tandem": _tandem(llm), "reference": reference}
        cases = [_case(family, engines, int(width), options, rng) for width in options.concurrency.split(",")]
    alone = next((case["tokens_per_s"]["reference"] for case in cases if case["at_once"] == 1), None)
    for case in cases if alone else ():
        ours = case["tokens_per_s"]["tandem"]
        case["x_one_by_one"] = {kind: round(ours[kind] / alone[kind], 2) for kind in KINDS}
    return cases


def _case(
    family: Family, engines: dict[str, Answer], width: int, options: argparse.Namespace, rng: random.Random
) -> dict[str, Any]:
    """Both engines' rates for `width` requests at once, taking turns on the same requests."""
    rounds = 1 if options.quick else options.rounds
    runs: dict[str, list[Figures]] = {name: [] for name in engines}
    equal = 0
    for i in range(rounds + 1):
        requests = [_request(family, options.prompt_tokens or NUM_PROMPT, rng) for _ in range(width)]
        answers = {}
        for name in sorted(engines, reverse=bool(i % 2)):
            torch.set_num_threads(options.threads)
            figures, answers[name] = _figures(engines[name], requests)
            if i:
                runs[name].append(figures)
        equal += sum(a == b for a, b in zip(answers["tandem"], answers["reference"], strict=True))
    rates = {name: {kind: median([run[kind] for run in own]) for kind in KINDS} for name, own in runs.items()}
    ratios = {kind: round(rates["tandem"][kind] / rates["reference"][kind], 2) for kind in KINDS}
    equal_answers = f"{equal}/{width * (rounds + 1)}"
    return {"at_once": width, "tokens_per_s": rates, "x_reference": ratios, "equal_answers": equal_answers}


def _request(family: Family, num_prompt: int, rng: random.Random) -> Request:
    text = tuple(rng.randrange(VOCAB) for _ in range(num_prompt))
    if not family.marks:
        return Request(ids=text)
    image = image_bytes(random_image(PIXELS, PIXELS, seed=rng.randrange(1 << 30)))
    return Request(ids=(*family.marks, *(token for token in text if token not in family.marks)), image=image)


def _tandem(llm: LLM) -> Answer:
    def answer(requests: Sequence[Request], num_new: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
        prompts = [{"prompt_token_ids": list(r.ids), "images": [] if r.image is None else [r.image]} for r in requests]
        return [answer.outputs[0].token_ids for answer in llm.generate(prompts, params)]

    return answer


def _figures(engine: Answer, requests: Sequence[Request]) -> tuple[Figures, list[list[int]]]:
    """Tokens per second of the prompts' text, and of what follows the first token."""
    started = time.perf_counter()
    engine(requests, 1)
    first = time.perf_counter() - started
    started = time.perf_counter()
    answers = engine(requests, NUM_NEW)
    whole = time.perf_counter() - started
    decode = len(requests) * (NUM_NEW - 1) / max(whole - first, 1e-9)
    return {"prefill": sum(len(request.ids) for request in requests) / first, "decode": decode}, answers


def table(report: dict[str, Any]) -> Table:
    """One row per family and number of requests at once; x: over the reference's one batch, and over its one by one."""
    others = {case["family"]: case["against"] for case in report["cases"] if case["against"] != TRANSFORMERS}
    made = Table(
        title=f"families, float32, {report['threads']} threads, {report['prompt_tokens']} + {NUM_NEW} tokens",
        caption=", ".join(f"{family} against: {against}" for family, against in others.items()) or None,
    )
    made.add_column("family", no_wrap=True)
    for column in ("at once", "prefill tok/s", "x batch", "x single", "decode tok/s", "x batch", "x single", "equal"):
        made.add_column(column, justify="right")
    for case in report["cases"]:
        cells = []
        for kind in KINDS:
            cells += [f"{case['tokens_per_s']['tandem'][kind]:.0f}", f"{case['x_reference'][kind]:.2f}"]
            cells.append(f"{case.get('x_one_by_one', {}).get(kind, '-')}")
        made.add_row(case["family"], str(case["at_once"]), *cells, case["equal_answers"])
    return made


if __name__ == "__main__":
    raise SystemExit(main())
