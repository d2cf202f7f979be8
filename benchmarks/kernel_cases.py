"""Cases of `bench_kernels` for ops on rows: norms, activations, rotary, linear layers, pages, blocks, 8-bit numbers.

A composition is what one would write without `kernels`, in plain torch, without its tricks and with the same rounding
of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F

from kernels.activation import gelu, gelu_sigmoid, gelu_tanh, swiglu
from kernels.blocks import blocks_to_pages, copy_pages, pages_to_blocks, place_rows, store_rows
from kernels.gates import relu_squared, sigmoid_blend, silu_gate, softcap
from kernels.linear import linear
from kernels.norm import add_rms_norm, layer_norm, rms_norm, rms_norm_heads
from kernels.pages import write_pages
from kernels.quantise import dequantise_rows, quantise_rows, read_quantised_pages, write_quantised_pages
from kernels.quantised_linear import (
    int4_linear,
    int8_dynamic_linear,
    int8_linear,
    quantise_weight_int4,
    quantise_weight_int8,
)
from kernels.rotary import inverse_frequencies, rotary_cos_sin, rotary_table, rotate

Call: TypeAlias = Callable[[], object]
EPS = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Two ways to the same result. is_comparable: unless they draw other numbers, or keep another format."""

    name: str
    op: Call
    naive: Call
    is_comparable: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a model of some 100 million parameters, and of a large vocabulary."""

    rows: tuple[int, ...] = (1, 8, 512)  # a decode step, a batch of eight, a prefill
    hidden: int = 768
    inner: int = 2048
    heads: int = 12
    kv_heads: int = 4
    head_dim: int = 64
    context: int = 512
    vocab: int = 152_064
    channels: int = 1024
    state: int = 16
    experts: int = 16

    @classmethod
    def tiny(cls) -> Sizes:
        return cls(
            rows=(1, 5), hidden=32, inner=64, heads=4, kv_heads=2, head_dim=8, context=24, vocab=64, channels=5,
            state=4, experts=4,
        )  # fmt: skip


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shuffled(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _naive_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


def _norms(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    weight, bias = (normal(sizes.hidden, dtype=dtype, seed=i) for i in (1, 2))
    by_head = normal(sizes.heads, sizes.head_dim, dtype=dtype)
    for rows in sizes.rows:
        x, residual = (normal(rows, sizes.hidden, dtype=dtype, seed=i) * 1e-3 for i in (3, 4))

        def naive_add(x: torch.Tensor = x, residual: torch.Tensor = residual) -> tuple[torch.Tensor, torch.Tensor]:
            residual.add_(x)
            return _naive_rms_norm(residual, weight), residual

        heads = normal(rows, sizes.heads + 4, sizes.head_dim, dtype=dtype)[:, : sizes.heads]
        yield Case(
            f"rms_norm {rows}", lambda x=x: rms_norm(x, weight, EPS), lambda x=x: _naive_rms_norm(x, weight)
        )  # fmt: skip
        yield Case(
            f"rms_norm, rounded first {rows}", lambda x=x: rms_norm(x, weight, EPS, round_before_weight=True),
            lambda x=x: _naive_rms_norm(x, torch.ones_like(weight)) * weight,
        )  # fmt: skip
        yield Case(
            f"add_rms_norm {rows}", lambda x=x, r=residual: add_rms_norm(x, r, weight, EPS), naive_add,
            is_comparable=False,  # each call adds to the residual
        )  # fmt: skip
        yield Case(
            f"rms_norm_heads {rows}", lambda x=heads: rms_norm_heads(x, by_head, EPS),
            lambda x=heads: _naive_rms_norm(x, by_head),
        )  # fmt: skip
        yield Case(
            f"layer_norm {rows}", lambda x=x: layer_norm(x, weight, bias, EPS),
            lambda x=x: F.layer_norm(x, weight.shape, weight, bias, EPS),
        )  # fmt: skip


def _pointwise(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    for rows in sizes.rows:
        pair = normal(rows, 2 * sizes.inner, dtype=dtype)
        x, y, z = (normal(rows, sizes.inner, dtype=dtype, seed=i) for i in range(3))

        def naive_swiglu(pair: torch.Tensor = pair) -> torch.Tensor:
            gate, up = pair.chunk(2, -1)
            return F.silu(gate) * up

        yield Case(f"swiglu {rows}", lambda p=pair: swiglu(p), naive_swiglu)
        yield Case(f"gelu {rows}", lambda x=x: gelu(x), lambda x=x: F.gelu(x))
        yield Case(f"gelu_tanh {rows}", lambda x=x: gelu_tanh(x), lambda x=x: F.gelu(x, approximate="tanh"))
        yield Case(f"gelu_sigmoid {rows}", lambda x=x: gelu_sigmoid(x), lambda x=x: x * torch.sigmoid(1.702 * x))
        yield Case(f"relu_squared {rows}", lambda x=x: relu_squared(x), lambda x=x: F.relu(x).square())
        yield Case(
            f"softcap {rows}", lambda x=x: softcap(x, 15.0),
            lambda x=x: (15.0 * torch.tanh(x.float() / 15.0)).to(x.dtype),
        )  # fmt: skip
        yield Case(
            f"sigmoid_blend {rows}", lambda g=x, a=y, b=z: sigmoid_blend(g, a, b),
            lambda g=x, a=y, b=z: _naive_blend(g, a, b),
        )  # fmt: skip
        yield Case(f"silu_gate {rows}", lambda x=x, g=y: silu_gate(x, g), lambda x=x, g=y: x * F.silu(g))


def _naive_blend(gate: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    share = torch.sigmoid(gate.float())
    return (share * first.float() + (1 - share) * second.float()).to(first.dtype)


def _rotary(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    half = sizes.head_dim // 2
    for rows in sizes.rows:
        x = normal(rows, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim, dtype=dtype)[:, : sizes.heads]
        frequencies = inverse_frequencies(sizes.head_dim, 1e6)
        table = rotary_table(*rotary_cos_sin(torch.arange(rows), frequencies))
        angles = torch.arange(rows)[:, None] * frequencies
        cos, sin = (torch.cat((f(angles), f(angles)), dim=-1)[:, None] for f in (torch.cos, torch.sin))

        def naive(x: torch.Tensor = x, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
            wide = x.float()
            turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
            return (wide * cos + turned * sin).to(x.dtype)

        yield Case(f"rotate {rows}", lambda x=x, t=table: rotate(x, t), naive)


def _linear(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    weight = normal(sizes.inner, sizes.hidden, dtype=dtype)
    bias = normal(sizes.inner, dtype=dtype)
    numbers, scales = quantise_weight_int8(weight)
    packed, group_scales = quantise_weight_int4(weight, 32)
    for rows in sizes.rows:
        x = normal(rows, sizes.hidden, dtype=dtype)
        yield Case(f"linear {rows}", lambda x=x: linear(x, weight, bias), lambda x=x: F.linear(x, weight, bias))
        yield Case(
            f"int8_linear {rows}", lambda x=x: int8_linear(x, numbers, scales),
            lambda x=x: F.linear(x, (numbers.float() * scales[:, None]).to(x.dtype)),
        )  # fmt: skip
        yield Case(
            f"int4_linear {rows}", lambda x=x: int4_linear(x, packed, group_scales),
            lambda x=x: F.linear(x, _naive_unpack(packed, group_scales, x.dtype)),
        )  # fmt: skip
        yield Case(
            f"int8_dynamic_linear {rows}", lambda x=x: int8_dynamic_linear(x, numbers, scales),
            lambda x=x: _naive_dynamic(x, numbers, scales),
        )  # fmt: skip


def _naive_unpack(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    halves = packed.view(*scales.shape, -1)
    numbers = torch.cat((halves & 15, halves >> 4), dim=-1).to(dtype) - 8
    return (numbers * scales[..., None].to(dtype)).view(len(packed), -1)


def _naive_dynamic(x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    steps = x.float().abs().amax(-1, keepdim=True) / 127
    rounded = (x.float() / steps).round()
    return (F.linear(rounded, numbers.float()) * scales * steps).to(x.dtype)


def _pages(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    heads, dim, size = sizes.kv_heads, sizes.head_dim, 16
    for rows in sizes.rows:
        num_pages = -(-rows // size) + 8
        k_cache, v_cache = (normal(num_pages, size, heads, dim, dtype=dtype, seed=i) for i in range(2))
        fused = normal(rows, 3 * heads, dim, dtype=dtype)
        k, v, slots = fused[:, heads : 2 * heads], fused[:, 2 * heads :], shuffled(num_pages * size)[:rows]

        def naive(
            caches: tuple[torch.Tensor, ...] = (k_cache, v_cache), kv: tuple[torch.Tensor, ...] = (k, v),
            slots: torch.Tensor = slots,
        ) -> None:  # fmt: skip
            for cache, new in zip(caches, kv, strict=True):
                cache[slots // size, slots % size] = new

        yield Case(
            f"write_pages {rows}", lambda a=k_cache, b=v_cache, k=k, v=v, s=slots: write_pages(a, b, k, v, s), naive,
            is_comparable=False,
        )  # fmt: skip
        narrow = torch.zeros(k_cache.shape, dtype=torch.int8)
        scales = torch.zeros(k_cache.shape[:-1])
        yield Case(
            f"write_quantised_pages {rows}", lambda c=narrow, f=scales, k=k, s=slots: write_quantised_pages(c, f, k, s),
            lambda c=narrow, f=scales, k=k, s=slots: _naive_write(c, f, k, s), is_comparable=False,
        )  # fmt: skip
        yield Case(
            f"read_quantised_pages {rows}",
            lambda c=narrow, f=scales, s=slots: read_quantised_pages(c, f, s, dtype),
            lambda c=narrow, f=scales, s=slots: (
                c[s // size, s % size].float() * f[s // size, s % size][..., None]).to(dtype),
        )  # fmt: skip
        values, factors = quantise_rows(k)
        yield Case(
            f"quantise_rows {rows}", lambda k=k: quantise_rows(k), lambda k=k: _naive_quantise(k),
            is_comparable=False,  # halves of a step may go either way
        )  # fmt: skip
        yield Case(
            f"dequantise_rows {rows}", lambda a=values, b=factors: dequantise_rows(a, b, dtype),
            lambda a=values, b=factors: (a.float() * b[..., None]).to(dtype),
        )  # fmt: skip


def _naive_quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = x.float().abs().amax(-1) / 127
    return (x.float() / scales.clamp_min(1e-30)[..., None]).round().to(torch.int8), scales


def _naive_write(cache: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, slots: torch.Tensor) -> None:
    size = cache.shape[1]
    cache[slots // size, slots % size], scales[slots // size, slots % size] = _naive_quantise(x)


def _blocks(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    size, width, rows = 128, sizes.hidden, max(sizes.rows)
    pool = normal(-(-rows // size) + 2, size, width, dtype=dtype)
    table, streams, order = shuffled(len(pool))[None], torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
    out, targets = normal(rows + 8, width, dtype=dtype), shuffled(rows + 8)[:rows]

    def naive_place() -> torch.Tensor:
        out[targets] = pool[table[streams, order // size], order % size]
        return out

    def naive_store() -> torch.Tensor:
        pool[table[streams, order // size], order % size] = out[:rows]
        return pool

    def in_place(function: Callable[..., None], result: torch.Tensor, *arguments: object) -> Call:
        return lambda: (function(*arguments), result)[1]

    yield Case(
        f"place_rows {rows}", in_place(place_rows, out, out, targets, pool, table, streams, order), naive_place
    )  # fmt: skip
    yield Case(
        f"store_rows {rows}", in_place(store_rows, pool, pool, table, streams, order, out[:rows]), naive_store
    )  # fmt: skip
    heads, dim = sizes.kv_heads, sizes.head_dim
    blocks = normal(max(2, -(-rows // size)), size, heads, dim, dtype=dtype)
    pages, page_ids = normal(-(-rows // 16), 16, heads, dim, dtype=dtype), shuffled(-(-rows // 16))
    block_ids = shuffled(len(blocks))

    def naive_to_pages() -> torch.Tensor:
        order = torch.arange(rows)
        pages[page_ids[order // 16], order % 16] = blocks[block_ids[order // size], order % size]
        return pages

    def naive_to_blocks() -> torch.Tensor:
        order = torch.arange(rows)
        blocks[block_ids[order // size], order % size] = pages[page_ids[order // 16], order % 16]
        return blocks

    yield Case(
        f"blocks_to_pages {rows}", in_place(blocks_to_pages, pages, blocks, block_ids, pages, page_ids, 0, rows),
        naive_to_pages,
    )  # fmt: skip
    yield Case(
        f"pages_to_blocks {rows}", in_place(pages_to_blocks, blocks, pages, page_ids, blocks, block_ids, 0, rows),
        naive_to_blocks,
    )  # fmt: skip
    sources, targets_of = torch.tensor([0]), torch.tensor([1])

    def naive_copy() -> torch.Tensor:
        blocks[targets_of] = blocks[sources]
        return blocks

    yield Case("copy_pages 1", in_place(copy_pages, blocks, [blocks], sources, targets_of), naive_copy)


GROUPS = (_norms, _pointwise, _rotary, _linear, _pages, _blocks)
