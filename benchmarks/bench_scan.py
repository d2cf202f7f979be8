"""FusionTree's scan and its whole prefill on the CPU: Tandem's, and plain torch with a Python loop over tokens.

    python -m benchmarks.bench_scan --json FILE [--quick]

A prompt of 4096 tokens, float32, states of 64 numbers: the scan of one layer, then models of 4 layers of several
widths. The goal is 20 times the training repository's, which loops once for the outputs and once more for the last
state; one loop alone is reported, too. Rounds alternate, the first is discarded; medians are reported.
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

from benchmarks.family_models import make_fusion_tree_of
from benchmarks.family_references import Request, fusion_tree
from benchmarks.fusion_tree_reference import looped_scan, looped_state
from benchmarks.report import machine, median, versions, write_json
from cluster import LLM, SamplingParams
from kernels.selective_scan import ScanWeights, selective_scan
from kernels.state_batch import StateBatch

RESULTS = Path(__file__).resolve().parent / "results"
STATE = 64
LAYERS = 4  # of the whole models
VOCAB = 300  # ids that prompts are drawn from
Ways = dict[str, Callable[[], None]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    tokens, rounds = (256, 1) if options.quick else (options.tokens, options.rounds)
    report: dict[str, Any] = {"machine": machine(), "versions": versions(("torch",)), "threads": options.threads}
    widths = [int(width) for width in options.channels.split(",")]
    report["cases"] = [_case(width, tokens, rounds) for width in widths]
    widths = [int(width) for width in options.widths.split(",") if width]
    report["models"] = [_whole_model(width, tokens, rounds, options.threads) for width in widths]
    write_json(options.json, report)
    for table in _tables(report):
        Console().print(table)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_scan", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "scan.json", help="where the JSON goes")
    parser.add_argument("--channels", default="256,1024,3072", help="comma-separated, twice the hidden size each")
    parser.add_argument("--widths", default="64,128,256", help="comma-separated hidden sizes of whole models")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of either")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one that is thrown away")
    parser.add_argument("--quick", action="store_true", help="one round of 256 tokens: does it run, not how fast is it")
    return parser.parse_args(arguments)


@torch.inference_mode()
def _case(channels: int, tokens: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, dt, b, c = torch.randn(tokens, 2 * channels + 2 * STATE, generator=generator).split(
        [channels, channels, STATE, STATE], dim=1
    )
    a = -torch.arange(1.0, STATE + 1).repeat(channels, 1)
    weights = ScanWeights(a=a, skip=torch.ones(channels), dt_bias=torch.zeros(channels))
    steps = torch.nn.functional.softplus(dt)
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        states = torch.zeros(1, channels, STATE)
        found["ours"] = selective_scan(x, dt, b, c, weights, states, StateBatch(lengths=[tokens], slots=[0]))

    def loop() -> None:
        state = torch.zeros(1, channels, STATE)
        found["loop"] = looped_scan(x[None], steps[None], a, b[None], c[None], weights.skip, state)[0][0]

    def again() -> None:
        looped_state(x[None], steps[None], a, b[None], torch.zeros(1, channels, STATE))

    medians = _medians({"ours": ours, "loop": loop, "again": again}, rounds)
    return {
        "channels": channels,
        "tokens": tokens,
        "seconds": medians,
        "x_loop": round(medians["loop"] / medians["ours"], 1),
        "x_both": round((medians["loop"] + medians["again"]) / medians["ours"], 1),
        "largest_difference": float((found["ours"] - found["loop"]).abs().max()),
    }


def _whole_model(width: int, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """A prompt and its first token, by the engine and by plain torch with one loop a layer, and with two."""
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(tokens)] for _ in range(rounds + 1)]
    chosen: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_fusion_tree_of(Path(scratch) / "model", width, LAYERS)
        references = {"loop": fusion_tree(folder, None), "both": fusion_tree(folder, None, loops_twice=True)}
        with LLM(model=str(folder), dtype="float32", device="cpu", num_threads=threads) as llm:
            params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
            turn = dict.fromkeys(("ours", *references), 0)  # every way answers every prompt

            def next_prompt(name: str) -> list[int]:
                turn[name] += 1
                return prompts[turn[name] - 1]

            def ours() -> None:
                chosen.setdefault("ours", []).extend(
                    llm.generate([next_prompt("ours")], params)[0].outputs[0].token_ids
                )

            def looping(name: str) -> Callable[[], None]:
                def run() -> None:
                    torch.set_num_threads(threads)
                    chosen.setdefault(name, []).extend(references[name]([Request(ids=tuple(next_prompt(name)))], 1)[0])

                return run

            medians = _medians({"ours": ours, **{name: looping(name) for name in references}}, rounds)
    return {
        "width": width,
        "layers": LAYERS,
        "tokens": tokens,
        "seconds": medians,
        "x_loop": round(medians["loop"] / medians["ours"], 1),
        "x_both": round(medians["both"] / medians["ours"], 1),
        "equal_answers": chosen["ours"] == chosen["loop"] == chosen["both"],
    }


def _medians(ways: Ways, rounds: int) -> dict[str, float]:
    """Seconds of each way, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in sorted(ways, reverse=bool(i % 2)):
            started = time.perf_counter()
            ways[name]()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def _tables(report: dict[str, Any]) -> list[Table]:
    """The scan, the whole models."""
    scan = Table(title=f"selective scan, float32, {report['threads']} threads")
    for column in ("channels", "tokens", "tandem ms", "loop ms", "x loop", "x both loops", "largest difference"):
        scan.add_column(column, justify="right")
    for case in report["cases"]:
        difference = f"{case['largest_difference']:.1e}"
        scan.add_row(str(case["channels"]), *_cells(case), difference)
    whole = Table(title=f"prefill of models of {LAYERS} layers, float32, {report['threads']} threads")
    for column in ("hidden size", "tokens", "tandem ms", "loop ms", "x loop", "x both loops", "equal"):
        whole.add_column(column, justify="right")
    for case in report["models"]:
        whole.add_row(str(case["width"]), *_cells(case), str(case["equal_answers"]))
    return [scan, whole]


def _cells(case: dict[str, Any]) -> list[str]:
    times = [f"{case['seconds'][name] * 1e3:.1f}" for name in ("ours", "loop")]
    return [str(case["tokens"]), *times, f"{case['x_loop']:.1f}", f"{case['x_both']:.1f}"]


if __name__ == "__main__":
    raise SystemExit(main())
