"""Cases that only move memory: norms, activations, rotary, pages, blocks, 8-bit rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.gpu.case import Case, Setting, called, compiled, num_bytes
from kernels.activation import gelu, gelu_sigmoid, gelu_tanh, swiglu
from kernels.blocks import blocks_to_pages, copy_pages, pages_to_blocks, place_rows, store_rows
from kernels.gates import relu_squared, sigmoid_blend, silu_gate, softcap
from kernels.norm import add_rms_norm, layer_norm, rms_norm, rms_norm_heads
from kernels.pages import write_pages
from kernels.quantise import quantise_rows, read_quantised_pages, write_quantised_pages
from kernels.rotary import inverse_frequencies, rotary_cos_sin, rotary_table, rotate


def _pointwise(setting: Setting) -> Iterator[Case]:
    width = setting.size(3584, 16)
    x, residual = (setting.normal(setting.size(8192, 3), width) for _ in range(2))
    weight = setting.normal(width)
    both = num_bytes(x, x)
    peers = {"torch": called(F.rms_norm, x, (width,), weight, 1e-6)}
    peers["compile"] = compiled(lambda a, w: F.rms_norm(a, (width,), w, 1e-6), x, weight)
    yield Case(name="rms_norm", kind="copy", work=both, call=lambda: rms_norm(x, weight, 1e-6), peers=peers)

    def add(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = a + b
        return F.rms_norm(total, (width,), weight, 1e-6), total

    yield Case(
        name="add_rms_norm", kind="copy", work=2 * both, call=lambda: add_rms_norm(x, residual, weight, 1e-6),
        peers={"torch": called(add, x, residual), "compile": compiled(add, x, residual)},
    )  # fmt: skip
    yield Case(
        name="layer_norm", kind="copy", work=both, call=lambda: layer_norm(x, weight, weight, 1e-6),
        peers={"torch": called(F.layer_norm, x, (width,), weight, weight, 1e-6)},
    )  # fmt: skip
    fused = setting.normal(setting.size(8192, 3), 2 * width)

    def gate(y: torch.Tensor) -> torch.Tensor:
        first, second = y.chunk(2, -1)
        return F.silu(first) * second

    yield Case(
        name="swiglu", kind="copy", work=1.5 * num_bytes(fused), call=lambda: swiglu(fused),
        peers={"torch": called(gate, fused), "compile": compiled(gate, fused)},
    )  # fmt: skip
    yield Case(
        name="silu_gate", kind="copy", work=1.5 * both, call=lambda: silu_gate(x, residual),
        peers={"torch": called(lambda: x * F.silu(residual))},
    )  # fmt: skip
    yield Case(
        name="sigmoid_blend", kind="copy", work=2 * both, call=lambda: sigmoid_blend(x, x, residual),
        peers={"torch": called(lambda: torch.lerp(residual, x, torch.sigmoid(x)))},
    )  # fmt: skip
    peers_of: dict[Callable[[torch.Tensor], torch.Tensor], Callable[[], object]] = {
        gelu: lambda: F.gelu(x),
        gelu_tanh: lambda: F.gelu(x, approximate="tanh"),
        gelu_sigmoid: lambda: x * torch.sigmoid(1.702 * x),
        relu_squared: lambda: F.relu(x).square(),
    }
    for op, peer in peers_of.items():
        yield Case(
            name=op.__name__, kind="copy", work=both, call=lambda op=op: op(x), peers={"torch": called(peer)}
        )  # fmt: skip
    yield Case(
        name="softcap", kind="copy", work=both, call=lambda: softcap(x, 30.0),
        peers={"torch": called(lambda: 30.0 * torch.tanh(x / 30.0))},
    )  # fmt: skip


def _rotary(setting: Setting) -> Iterator[Case]:
    tokens, heads, dim = setting.size(8192, 3), setting.size(32, 2), setting.size(128, 8)
    x = setting.normal(tokens, heads, dim)
    frequencies = inverse_frequencies(dim, 1e6).to(setting.device)
    table = rotary_table(*rotary_cos_sin(setting.index(range(tokens)), frequencies))
    cos, sin = (part.to(setting.dtype) for part in (table.cos, table.signed_sin))

    def composed(y: torch.Tensor) -> torch.Tensor:
        return y * cos + y.roll(dim // 2, -1) * sin

    yield Case(
        name="rotate", kind="copy", work=2 * num_bytes(x), call=lambda: rotate(x, table),
        peers={"torch": called(composed, x), "compile": compiled(composed, x)},
    )  # fmt: skip
    weight = setting.normal(heads, dim)
    yield Case(
        name="rms_norm_heads", kind="copy", work=2 * num_bytes(x), call=lambda: rms_norm_heads(x, weight, 1e-6),
        peers={"compile": compiled(lambda a, w: F.rms_norm(a, (dim,), None, 1e-6) * w, x, weight)},
    )  # fmt: skip


def _pages(setting: Setting) -> Iterator[Case]:
    tokens, heads, dim, size = setting.size(16384, 8), setting.size(8, 2), setting.size(128, 4), setting.size(16, 2)
    num_pages = tokens // size
    k_cache, v_cache = (setting.normal(num_pages, size, heads, dim) for _ in range(2))
    k, v = (setting.normal(tokens, heads, dim) for _ in range(2))
    slots, flat = setting.shuffled(tokens), k_cache.view(tokens, -1)
    yield Case(
        name="write_pages", kind="copy", work=2 * num_bytes(k, v),
        call=lambda: write_pages(k_cache, v_cache, k, v, slots),
        peers={"torch": called(lambda: (flat.index_copy_(0, slots, k.view(tokens, -1)),
                                        v_cache.view(tokens, -1).index_copy_(0, slots, v.view(tokens, -1))))},
    )  # fmt: skip
    pages = setting.shuffled(num_pages)
    half = num_pages // 2
    yield Case(
        name="copy_pages", kind="copy", work=num_bytes(k_cache, v_cache),
        call=lambda: copy_pages([k_cache, v_cache], pages[:half], pages[half : 2 * half]),
    )  # fmt: skip
    blocks = setting.normal(num_pages * size // setting.size(128, 4), setting.size(128, 4), heads, dim)
    block_ids = setting.shuffled(len(blocks))
    yield Case(
        name="blocks_to_pages", kind="copy", work=2 * num_bytes(blocks),
        call=lambda: blocks_to_pages(blocks, block_ids, k_cache, pages, 0, tokens),
    )  # fmt: skip
    yield Case(
        name="pages_to_blocks", kind="copy", work=2 * num_bytes(blocks),
        call=lambda: pages_to_blocks(k_cache, pages, blocks, block_ids, 0, tokens),
    )  # fmt: skip
    hidden = setting.size(3584, 8)
    pool = setting.normal(setting.size(64, 2), setting.size(128, 4), hidden)
    rows = setting.index(range(pool.shape[0] * pool.shape[1]))
    table, streams = setting.shuffled(len(pool))[None], torch.zeros_like(rows)
    out = setting.normal(len(rows) + 5, hidden)
    targets = setting.shuffled(len(rows))
    yield Case(
        name="place_rows", kind="copy", work=2 * num_bytes(pool),
        call=lambda: place_rows(out, targets, pool, table, streams, rows),
        peers={"torch": called(lambda: out.index_copy_(0, targets, pool.view(len(rows), -1)[rows]))},
    )  # fmt: skip
    values = out[: len(rows)]
    yield Case(
        name="store_rows", kind="copy", work=2 * num_bytes(pool),
        call=lambda: store_rows(pool, table, streams, rows, values),
        peers={"torch": called(lambda: pool.view(len(rows), -1).index_copy_(0, targets, values))},
    )  # fmt: skip


def _quantised(setting: Setting) -> Iterator[Case]:
    x = setting.normal(setting.size(16384, 8), setting.size(8, 2), setting.size(128, 4))
    values, scales = quantise_rows(x)
    work = num_bytes(x, values, scales)
    yield Case(name="quantise_rows int8", kind="copy", work=work, call=lambda: quantise_rows(x))
    size = setting.size(16, 2)
    cache, cache_scales = values.view(-1, size, *values.shape[1:]), scales.view(-1, size, scales.shape[1])
    slots = setting.shuffled(len(x))
    yield Case(
        name="write_quantised_pages", kind="copy", work=work,
        call=lambda: write_quantised_pages(cache, cache_scales, x, slots),
    )  # fmt: skip
    yield Case(
        name="read_quantised_pages", kind="copy", work=work,
        call=lambda: read_quantised_pages(cache, cache_scales, slots, setting.dtype),
    )  # fmt: skip


GROUPS = (_pointwise, _rotary, _pages, _quantised)
