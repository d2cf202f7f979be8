"""Cases of attention, sampling, matrices and state space at the sizes of real models."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.gpu.case import Case, Setting, called, compiled, num_bytes
from kernels.causal_conv import causal_conv, causal_conv_update
from kernels.experts import combine_experts, grouped_matmul
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.quantised_linear import int4_linear, int8_linear, quantise_weight_int4, quantise_weight_int8
from kernels.sampling import filter_cut, gumbel_max, softmax_statistics
from kernels.selection import select_threshold
from kernels.selective_scan import ScanWeights, selective_scan, selective_update
from kernels.state_batch import StateBatch
from kernels.varlen_attention import Segments, varlen_attention


def _decode(setting: Setting) -> Iterator[Case]:
    heads, kv_heads, dim, size = setting.size(32, 2), setting.size(8, 1), setting.size(128, 4), setting.size(16, 2)
    for count, length in ((16, 4096), (64, 4096), (1, 32768)):
        count, length = setting.size(count, 2), setting.size(length, 6)
        num_pages = count * length // size
        k_cache, v_cache = (setting.normal(num_pages, size, kv_heads, dim) for _ in range(2))
        table = setting.shuffled(num_pages).view(count, -1).cpu()
        batch = AttentionBatch(
            page_table=table, query_lens=[1] * count, kv_lens=[length] * count, query_start=list(range(count))
        )
        q = setting.normal(count, heads, dim)
        # contiguous keys and values: what a peer without pages gets
        k, v = (cache.view(count, length, kv_heads, dim).transpose(1, 2) for cache in (k_cache, v_cache))
        queries = q[:, :, None]
        yield Case(
            name=f"paged decode {count} x {length}", kind="copy", work=num_bytes(k_cache, v_cache, q, q),
            call=lambda q=q, k_cache=k_cache, v_cache=v_cache, batch=batch: paged_attention(q, k_cache, v_cache, batch),
            peers={"sdpa": called(lambda a, b, c: F.scaled_dot_product_attention(a, b, c, enable_gqa=True),
                                  queries, k, v)},
        )  # fmt: skip


def _prefill(setting: Setting) -> Iterator[Case]:
    heads, kv_heads, dim, size = setting.size(32, 2), setting.size(8, 1), setting.size(128, 4), setting.size(16, 2)
    length = setting.size(8192, 6)
    k_cache, v_cache = (setting.normal(length // size, size, kv_heads, dim) for _ in range(2))
    q = setting.normal(length, heads, dim)
    table = setting.shuffled(length // size)[None].cpu()
    batch = AttentionBatch(page_table=table, query_lens=[length], kv_lens=[length], query_start=[0])
    k, v = (cache.view(1, length, kv_heads, dim).transpose(1, 2) for cache in (k_cache, v_cache))
    queries = q[None].transpose(1, 2)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(queries, k, v, is_causal=True, enable_gqa=True)

    yield Case(
        name=f"paged prefill {length}", kind="matmul", work=2.0 * heads * dim * length**2,  # half of 4 h d n^2
        call=lambda: paged_attention(q, k_cache, v_cache, batch), peers={"sdpa": called(sdpa)},
    )  # fmt: skip


def _segments(setting: Setting) -> Iterator[Case]:
    heads, dim = setting.size(16, 1), setting.size(80, 4)
    for length, count in ((64, 128), (8192, 1)):
        length, count = setting.size(length, 4), setting.size(count, 2)
        q, k, v = (setting.normal(length * count, heads, dim) for _ in range(3))
        segments = Segments.from_lengths([length] * count)
        batched = [x.view(count, length, heads, dim).transpose(1, 2) for x in (q, k, v)]
        yield Case(
            name=f"vision attention {count} x {length}", kind="matmul", work=4.0 * heads * dim * count * length**2,
            call=lambda q=q, k=k, v=v, segments=segments: varlen_attention(q, k, v, segments),
            peers={"sdpa": called(F.scaled_dot_product_attention, *batched)},
        )  # fmt: skip


def _sampling(setting: Setting) -> Iterator[Case]:
    vocab = setting.size(152_064, 50)

    def composed(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p = torch.softmax(x.float(), -1)
        return p.max(-1).values, x.argmax(-1), torch.logsumexp(x.float(), -1), -(p * p.log().nan_to_num()).sum(-1)

    for rows in (1, 32, 1024):
        rows = setting.size(rows, 2)
        logits = setting.normal(rows, vocab)
        one, index = torch.ones(rows, device=setting.device), setting.index(range(rows))
        yield Case(
            name=f"softmax_statistics {rows}", kind="copy", work=num_bytes(logits),
            call=lambda logits=logits: softmax_statistics(logits),
            peers={"torch": called(composed, logits), "compile": compiled(composed, logits)},
        )  # fmt: skip
        yield Case(
            name=f"gumbel_max {rows}", kind="copy", work=num_bytes(logits),
            call=lambda logits=logits, one=one, index=index: gumbel_max(logits, one, index, index, index),
            peers={"torch": called(lambda x: torch.multinomial(torch.softmax(x.float(), -1), 1), logits)},
        )  # fmt: skip
        if rows <= 32:
            top_k, top_p = torch.full_like(index, 50), one * 0.9
            yield Case(
                name=f"filter_cut {rows}", kind="copy", work=num_bytes(logits),
                call=lambda x=logits, one=one, k=top_k, p=top_p: filter_cut(x, one, k, p, one * 0.01),
                peers={"sort": called(lambda x: x.float().sort(-1, descending=True), logits)},
            )  # fmt: skip

    length = setting.size(32, 4)
    confidence = torch.rand(setting.size(64, 2), length, device=setting.device)
    is_open = confidence > 0.1
    yield Case(
        name=f"select_threshold {len(confidence)} x {length}", kind="copy",
        work=num_bytes(confidence, is_open, is_open),
        call=lambda: select_threshold(confidence, is_open, confidence[:, 0]),
    )  # fmt: skip


def _matrices(setting: Setting) -> Iterator[Case]:
    width = setting.size(8192, 64)
    weight = setting.normal(width, width)
    numbers, scales = quantise_weight_int8(weight)
    packed, group_scales = quantise_weight_int4(weight, setting.size(128, 32))
    for rows in (1, 16):
        x = setting.normal(rows, width)
        peers = {"bf16": called(F.linear, x, weight)}
        yield Case(
            name=f"int8_linear {rows}", kind="copy", work=num_bytes(numbers, scales, x, x),
            call=lambda x=x: int8_linear(x, numbers, scales), peers=peers,
        )  # fmt: skip
        yield Case(
            name=f"int4_linear {rows}", kind="copy", work=num_bytes(packed, group_scales, x, x),
            call=lambda x=x: int4_linear(x, packed, group_scales), peers=peers,
        )  # fmt: skip
    num_experts, inputs, outputs = setting.size(64, 2), setting.size(2048, 16), setting.size(1408, 8)
    experts = setting.normal(num_experts, outputs, inputs)
    for each in (4, 256):
        each = setting.size(each, 3)
        x = setting.normal(num_experts * each, inputs)
        offsets = setting.index(range(0, num_experts * each + 1, each))
        weights_bound = each < 64  # few rows: reading the experts is all the time
        yield Case(
            name=f"grouped_matmul {num_experts} x {each}", kind="copy" if weights_bound else "matmul",
            work=num_bytes(experts) if weights_bound else 2.0 * len(x) * inputs * outputs,
            call=lambda x=x, offsets=offsets: grouped_matmul(x, experts, offsets),
            peers={"bmm": called(lambda x: torch.bmm(x.view(num_experts, -1, inputs), experts.transpose(1, 2)), x)},
        )  # fmt: skip
    top_k, tokens = setting.size(8, 2), setting.size(2048, 3)
    rows, places = setting.normal(tokens * top_k, inputs), setting.shuffled(tokens * top_k).view(tokens, top_k)
    shares = torch.rand(tokens, top_k, device=setting.device)
    yield Case(
        name=f"combine_experts {tokens} x {top_k}", kind="copy", work=num_bytes(rows) * (1 + 1 / top_k),
        call=lambda: combine_experts(rows, places, shares),
        peers={"torch": called(lambda: (rows[places] * shares[:, :, None]).sum(1))},
    )  # fmt: skip


def _state_space(setting: Setting) -> Iterator[Case]:
    channels = setting.size(3072, 5)
    for size in (16, 64):
        size = setting.size(size, 4)
        a = -torch.rand(channels, size, device=setting.device)
        weights = ScanWeights(a=a, skip=setting.normal(channels), dt_bias=setting.normal(channels))
        tokens = setting.size(8192, 7)
        x, dt, gate = (setting.normal(tokens, channels) for _ in range(3))
        b, c = (setting.normal(tokens, size) for _ in range(2))
        states = torch.zeros(1, channels, size, device=setting.device)
        batch = StateBatch(lengths=[tokens], slots=[0])
        yield Case(
            name=f"selective_scan {tokens}, state {size}", kind="copy", work=num_bytes(x, dt, gate, x, b, c),
            call=lambda x=x, dt=dt, b=b, c=c, w=weights, s=states, batch=batch, gate=gate: selective_scan(
                x, dt, b, c, w, s, batch, gate),
        )  # fmt: skip
        rows = setting.size(64, 2)
        many = torch.zeros(rows, channels, size, device=setting.device)
        slots = setting.index(range(rows))
        yield Case(
            name=f"selective_update {rows}, state {size}", kind="copy", work=2 * num_bytes(many),
            call=lambda x=x[:rows], dt=dt[:rows], b=b[:rows], c=c[:rows], w=weights, s=many, slots=slots:
            selective_update(x, dt, b, c, w, s, slots),
        )  # fmt: skip
    weight, tails = setting.normal(channels, 4), torch.zeros(1, channels, 3, device=setting.device, dtype=setting.dtype)
    yield Case(
        name=f"causal_conv {tokens}", kind="copy", work=2 * num_bytes(x),
        call=lambda: causal_conv(x, weight, None, tails, batch),
    )  # fmt: skip
    many_tails = torch.zeros(rows, channels, 3, device=setting.device, dtype=setting.dtype)
    yield Case(
        name=f"causal_conv_update {rows}", kind="copy", work=2 * num_bytes(many_tails, x[:rows]),
        call=lambda: causal_conv_update(x[:rows], weight, None, many_tails, slots),
    )  # fmt: skip


GROUPS = (_decode, _prefill, _segments, _sampling, _matrices, _state_space)
