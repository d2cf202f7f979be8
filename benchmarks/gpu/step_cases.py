"""Whole decode steps of a dense model at the size of Qwen2.5-1.5B: recorded as a CUDA graph, against the same launches
one by one. Where both do not give the same logits there are no figures."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.case import Case, Setting, num_bytes
from kernels.dispatch import forced
from language_worker.kv_cache import KVCache
from language_worker.models.base import KVSpec, ModelSpec
from language_worker.models.decoder import Decoder
from language_worker.models.layers import BlockShape, RotaryPositions
from language_worker.models.rope import Rope
from language_worker.models.text_decoder import Qwen2
from language_worker.plan import StepPlan, Window
from language_worker.request import Sequence
from language_worker.runner import ModelRunner
from language_worker.step_graphs import StepGraphs, num_spare_pages

PAGE_SIZE = 32


def _steps(setting: Setting) -> Iterator[Case]:
    if setting.device.type != "cuda":
        return
    length = setting.size(1024, 5)
    for count in (1, 8, 64):
        count = setting.size(count, min(count, 3))
        num_pages = count * -(-(length + 1) // PAGE_SIZE)
        model = _model(setting, length + 1)
        cache = KVCache(
            model.spec.kv, num_pages=num_pages, page_size=PAGE_SIZE, dtype=setting.dtype, device=setting.device,
            num_spare=num_spare_pages(PAGE_SIZE),
        )  # fmt: skip
        for keys, values in cache.layers:
            keys.normal_()
            values.normal_()
        runners = [
            ModelRunner(model, cache, setting.device, graphs=graphs)
            for graphs in (StepGraphs(model, cache, setting.device), None)
        ]
        plan = StepPlan(windows=tuple(_window(i, length, num_pages // count) for i in range(count)))
        with forced("triton"):
            runners[0].run(plan)  # what comes once is not recorded
            recorded, eager = (runner.run(plan).logits.float().cpu() for runner in runners)
        graphs = runners[0].graphs
        assert graphs is not None and graphs.num_replays, "the step was not recorded"
        torch.testing.assert_close(recorded, eager, atol=2e-2, rtol=2e-2)
        weights = sum(num_bytes(weight) for weight in model.parameters().values() if isinstance(weight, torch.Tensor))
        kv = count * length * model.spec.kv.bytes_per_token(setting.dtype)
        yield Case(
            name=f"decode step {count} x {length}", kind="copy", work=weights + kv,
            call=lambda runner=runners[0], plan=plan: runner.run(plan),
            peers={"one by one": lambda runner=runners[1], plan=plan: lambda: runner.run(plan)},
        )  # fmt: skip


def _model(setting: Setting, max_len: int) -> Decoder:
    """Random weights, small enough that nothing overflows; the head is the embedding."""
    heads, kv_heads, dim = setting.size(12, 2), setting.size(2, 1), setting.size(128, 16)
    block = BlockShape(
        hidden_size=heads * dim, intermediate_size=setting.size(8960, 48), num_heads=heads, num_kv_heads=kv_heads,
        head_dim=dim, eps=1e-6, has_qkv_bias=True,
    )  # fmt: skip
    kv = KVSpec(num_layers=setting.size(28, 2), num_kv_heads=kv_heads, head_dim=dim)
    spec = ModelSpec(
        vocab_size=setting.size(151_936, 96), hidden_size=block.hidden_size, max_position_embeddings=max_len, kv=kv,
        media_token_id=None,
    )  # fmt: skip
    rotary = RotaryPositions(Rope(theta=1e6), head_dim=dim, device=setting.device)
    model = Qwen2(spec, block, rotary, tied=True, dtype=setting.dtype, device=setting.device)
    for weight in model.parameters().values():
        assert isinstance(weight, torch.Tensor)
        weight.normal_(std=0.02)
    model.reserve_positions(max_len)
    return model


def _window(index: int, length: int, num_pages: int) -> Window:
    """A sequence whose KV but for the last position is there, in pages of its own."""
    seq = Sequence(key=(index, 0), prompt=[7] * (length - 1), max_len=length + 1)
    seq.tokens.append(index % 96)
    seq.kv_len = length - 1
    seq.pages = list(range(index * num_pages, (index + 1) * num_pages))
    return Window(seq=seq, start=length - 1, length=1, num_final=1, samples=True)


GROUPS = (_steps,)
