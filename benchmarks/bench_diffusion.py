"""Block diffusion on the CPU against the published loop: tokens and forwards per second, in one interleaved run.

    python -m benchmarks.bench_diffusion --json FILE [--quick]

The model is a random LLaDA of about 100 million parameters, or of 10 where a machine is busy. Random logits never reach
a threshold, so our logits are replaced, after they were computed, by ones of which three masks of every block are
certain. The published loop (transformers' Llama without a causal mask; one token a step, the whole canvas every time,
one request at a time) costs the same in every step, so only some of its steps are timed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.report import machine, median, versions, write_json
from examples.sums import build_tokenizer, save_tokenizer
from language_worker.api import GenerateRequest, RequestDone
from language_worker.config import EngineConfig
from language_worker.diffusion_params import DiffusionParams
from language_worker.engine import Engine
from language_worker.engine_builder import build_engine
from language_worker.models.base import StepInputs
from language_worker.sampling_params import SamplingParams

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {
    "100m": {"d_model": 768, "n_heads": 12, "n_layers": 12, "mlp_hidden_size": 2048, "vocab_size": 8192},
    "10m": {"d_model": 256, "n_heads": 4, "n_layers": 8, "mlp_hidden_size": 688, "vocab_size": 8192},
}
NUM_CERTAIN, CERTAIN_ID, BLOCK = 3, 40, 32
LLAMA_NAMES = {
    "attn_out": "self_attn.o_proj", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj", "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_diffusion", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "diffusion.json", help="where the JSON goes")
    parser.add_argument("--model", choices=SIZES, default="100m")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--concurrency", default="1,16", help="comma-separated numbers of requests at once")
    parser.add_argument("--peer-steps", type=int, default=5, help="steps of the published loop in every round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round: does it run, not how fast is it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = random_checkpoint(RESULTS / "models" / f"llada-{options.model}", SIZES[options.model])
    config = EngineConfig(dtype="float32", device="cpu", kv_cache_tokens=16384, num_threads=options.threads)
    engine, loop = build_engine(folder, config), PublishedLoop(folder)
    engine.runner.forward = planted(engine.runner.forward)  # type: ignore[method-assign]
    rates: dict[str, list[dict[str, float]]] = {}

    def note(case: str, figures: dict[str, float]) -> None:
        rates.setdefault(case, []).append(figures)
        print(f"{case}: {figures['tokens_per_s']:.2f} tok/s", flush=True)  # long work shows how far it is

    for _ in range(1 if options.quick else options.rounds):
        note("published loop", loop.run(options))
        for width in map(int, options.concurrency.split(",")):
            note(f"dual, 3 a forward, {width} at once", ours(engine, width, THRESHOLD, options))
        note("dual, 1 a forward, 1 at once", ours(engine, 1, STATIC, options))
    report = {"machine": machine(), "versions": versions(("torch", "transformers")), "model": options.model}
    report |= {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "cases": _medians(rates)}
    write_json(options.json, report)
    Console().print(_table(report["cases"]))
    return 0


THRESHOLD = DiffusionParams(schedule="threshold", block_length=BLOCK, kv_policy="dual")
STATIC = DiffusionParams(schedule="static", block_length=BLOCK, kv_policy="dual")


def ours(engine: Engine, width: int, params: DiffusionParams, options: argparse.Namespace) -> dict[str, float]:
    """`width` requests at once, to their end. What was forwarded is checked against what the policy should forward."""
    sampling = SamplingParams(max_tokens=options.new_tokens, temperature=0.0, ignore_eos=True, diffusion=params)
    done: list[RequestDone] = []
    started = time.perf_counter()
    for i in range(width):
        prompt = tuple((7 * i + j) % 200 for j in range(options.prompt_tokens))
        engine.submit(GenerateRequest(request_id=f"r{i}", prompt_token_ids=prompt, sampling=sampling))
    while len(done) < width:
        done += [output for output in engine.step().outputs if isinstance(output, RequestDone)]
    seconds = time.perf_counter() - started
    steps = math.ceil(BLOCK / NUM_CERTAIN) if params is THRESHOLD else BLOCK
    num_blocks = options.new_tokens // BLOCK
    expected = num_blocks * (options.prompt_tokens + options.new_tokens + (steps - 1) * BLOCK)
    assert all(one.num_forwarded_tokens == expected for one in done), "forwarded tokens differ from the policy's"
    forwards = sum(one.num_forwards for one in done)
    return {"tokens_per_s": width * options.new_tokens / seconds, "forwards_per_s": forwards / seconds}


def planted(forward: Callable[[StepInputs], torch.Tensor]) -> Callable[[StepInputs], torch.Tensor]:
    """`forward` with the first masks of every window certain and the others evenly unsure."""

    def run(inputs: StepInputs) -> torch.Tensor:
        logits = forward(inputs)
        rows = torch.arange(logits.shape[0]) if inputs.logit_rows is None else inputs.logit_rows
        window = torch.bucketize(rows, torch.tensor(inputs.attention.query_start), right=True)
        first = torch.searchsorted(window, window)
        logits.zero_()
        logits[torch.arange(len(rows)) - first < NUM_CERTAIN, CERTAIN_ID] = 30.0
        return logits

    return run


class PublishedLoop:
    """The loop as published, over transformers' modules."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        own = json.loads((folder / "config.json").read_text())
        config = LlamaConfig(
            hidden_size=own["d_model"], num_attention_heads=own["n_heads"], num_hidden_layers=own["n_layers"],
            intermediate_size=own["mlp_hidden_size"], vocab_size=own["vocab_size"], rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
        )  # fmt: skip
        self._model = LlamaForCausalLM(config).eval()
        self._model.load_state_dict(
            {_llama_name(n): t.float() for n, t in load_file(folder / "model.safetensors").items()}
        )
        self._mask_id = own["mask_token_id"]

    @torch.inference_mode()
    def run(self, options: argparse.Namespace) -> dict[str, float]:
        """A token a step, the most confident of the first block."""
        length = options.prompt_tokens + options.new_tokens
        canvas = torch.full((1, length), self._mask_id)
        canvas[:, : options.prompt_tokens] = torch.arange(options.prompt_tokens) % 200
        everything = torch.zeros(1, 1, length, length)
        started = time.perf_counter()
        for _ in range(options.peer_steps):
            logits = self._model(canvas, attention_mask=everything, use_cache=False).logits
            token = logits.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
            confidence[canvas != self._mask_id] = -math.inf
            confidence[:, options.prompt_tokens + BLOCK :] = -math.inf
            place = confidence.argmax(-1)
            canvas[0, place] = token[0, place]
        rate = options.peer_steps / (time.perf_counter() - started)
        return {"tokens_per_s": rate, "forwards_per_s": rate}


def random_checkpoint(folder: Path, sizes: dict[str, int]) -> Path:
    """Written once."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, folder)
    generator = torch.Generator().manual_seed(0)
    width, inner, vocab = sizes["d_model"], sizes["mlp_hidden_size"], sizes["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocab, width), "ln_f": (width,), "ff_out": (vocab, width)}
    for i in range(sizes["n_layers"]):
        own: dict[str, tuple[int, ...]] = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (width, width))
        own |= {"ff_proj": (inner, width), "up_proj": (inner, width), "ff_out": (width, inner)}
        own |= {"attn_norm": (width,), "ff_norm": (width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
    tensors = {
        f"model.transformer.{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        for name, shape in shapes.items()
    }
    mask_id = tokenizer.token_to_id("<|mdm_mask|>")
    config = {"architectures": ["LLaDAModelLM"], **sizes, "max_sequence_length": 4096, "rope_theta": 500000.0}
    config |= {"rms_norm_eps": 1e-5, "mask_token_id": mask_id, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _llama_name(name: str) -> str:
    parts = name.removeprefix("model.transformer.").split(".")
    if parts[0] != "blocks":
        return {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}[parts[0]] + ".weight"
    return f"model.layers.{parts[1]}.{LLAMA_NAMES[parts[2]]}.weight"


def _medians(rates: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Per case: medians over the rounds, and the median of each round's ratio to the published loop."""
    peer = rates["published loop"]
    return [
        {
            "case": case,
            **{name: median([one[name] for one in own]) for name in ("tokens_per_s", "forwards_per_s")},
            "times_published": median(
                [one["tokens_per_s"] / other["tokens_per_s"] for one, other in zip(own, peer, strict=True)]
            ),
        }
        for case, own in rates.items()
    ]


def _table(cases: Sequence[dict[str, Any]]) -> Table:
    table = Table("case", "tok/s", "forwards/s", "x published")
    for case in cases:
        figures = (case["tokens_per_s"], case["forwards_per_s"], case["times_published"])
        table.add_row(case["case"], *(f"{value:.2f}" for value in figures))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
