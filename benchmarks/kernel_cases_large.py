"""Cases of `bench_kernels` for attention, experts, sampling, selection and state space. See `kernel_cases`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.fusion_tree_reference import looped_scan
from benchmarks.kernel_cases import Case, Sizes, normal, shuffled
from kernels.attention_mask import AttentionMask
from kernels.causal_conv import causal_conv, causal_conv_update
from kernels.experts import combine_experts, group_by_expert, grouped_matmul, route, route_grouped
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.sampling import filter_cut, gumbel_max, keep_mask, softmax_statistics, token_logprobs
from kernels.selection import select_count, select_entropy, select_factor, select_threshold
from kernels.selective_scan import ScanWeights, selective_scan, selective_update
from kernels.state_batch import StateBatch
from kernels.varlen_attention import Segments, varlen_attention

PAGE = 16


def _attention(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """Decode steps of one and of eight sequences, one of them with a window; a prefill; segments of a vision tower."""
    heads, kv_heads, dim, length = sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.context
    for count, asked, window in ((1, 1, 0), (8, 1, 0), (8, 1, length // 4), (1, length, 0)):
        each = -(-length // PAGE)
        k_cache, v_cache = (normal(count * each, PAGE, kv_heads, dim, dtype=dtype, seed=i) for i in range(2))
        table = shuffled(count * each).view(count, each)
        starts = [i * asked for i in range(count)]
        batch = AttentionBatch(
            page_table=table, query_lens=[asked] * count, kv_lens=[length] * count, query_start=starts
        )
        q, mask = normal(count * asked, heads, dim, dtype=dtype), AttentionMask(window=window)

        def naive(
            q: torch.Tensor = q, caches: tuple[torch.Tensor, ...] = (k_cache, v_cache), table: torch.Tensor = table,
            asked: int = asked, mask: AttentionMask = mask,
        ) -> torch.Tensor:  # fmt: skip
            """One sequence after the other: pages gathered, key heads repeated, torch's own attention."""
            seen = mask.visible(torch.arange(length - asked, length), torch.arange(length))
            parts = []
            for row, own in enumerate(table):
                k, v = (cache[own].flatten(0, 1)[:length].transpose(0, 1) for cache in caches)
                k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
                mine = q[row * asked : (row + 1) * asked].transpose(0, 1)
                parts.append(F.scaled_dot_product_attention(mine, k, v, attn_mask=seen).transpose(0, 1))
            return torch.cat(parts)

        name = f"prefill {asked}" if asked > 1 else f"decode {count} x {length}{f', window {window}' if window else ''}"
        yield Case(
            f"paged_attention {name}",
            lambda q=q, k=k_cache, v=v_cache, b=batch, m=mask: paged_attention(q, k, v, b, mask=m), naive,
        )  # fmt: skip
    lengths = [length // 8] * 4 + [length // 2]
    q, k, v = normal(sum(lengths), 3, heads, dim, dtype=dtype).unbind(1)
    segments = Segments.from_lengths(lengths)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    def naive_segments() -> torch.Tensor:
        """One call with a mask, as a vision tower without variable lengths has it."""
        x, y, z = (part.transpose(0, 1) for part in (q, k, v))
        return F.scaled_dot_product_attention(x, y, z, attn_mask=owner[:, None] == owner).transpose(0, 1)

    yield Case(f"varlen_attention {sum(lengths)}", lambda: varlen_attention(q, k, v, segments), naive_segments)


def _experts(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    experts, hidden, inner, top_k = sizes.experts, sizes.hidden // 2, sizes.inner // 4, 2
    weight, bias = normal(experts, inner, hidden, dtype=dtype), normal(experts, dtype=torch.float32)
    for rows in sizes.rows:
        x, logits = normal(rows, hidden, dtype=dtype), normal(rows, experts, dtype=dtype)
        shares, chosen = route(logits, top_k, normalise=True)
        groups = group_by_expert(chosen, experts)
        products = grouped_matmul(x, weight, groups.offsets, groups.tokens)

        def naive_route(logits: torch.Tensor = logits) -> tuple[torch.Tensor, torch.Tensor]:
            weights, experts = torch.topk(torch.softmax(logits.float(), -1), top_k, dim=-1)
            return weights / weights.sum(-1, keepdim=True), experts

        def naive_grouped(logits: torch.Tensor = logits) -> tuple[torch.Tensor, torch.Tensor]:
            scores = torch.sigmoid(logits.float())
            wanted = scores + bias
            best = wanted.view(len(scores), 2, -1).topk(2, dim=-1).values.sum(-1)
            kept = F.one_hot(best.argmax(-1), 2).bool().repeat_interleave(experts // 2, dim=1)
            experts_of = wanted.masked_fill(~kept, -torch.inf).topk(top_k, dim=-1).indices
            return scores.gather(1, experts_of), experts_of

        def naive_matmul(
            x: torch.Tensor = x, chosen: torch.Tensor = chosen, places: torch.Tensor = groups.places
        ) -> torch.Tensor:
            """Expert by expert, its tokens found by comparing."""
            out = torch.empty(chosen.numel(), inner, dtype=x.dtype)
            for expert in range(experts):
                tokens, choices = (chosen == expert).nonzero(as_tuple=True)
                out[places[tokens, choices]] = F.linear(x[tokens], weight[expert])
            return out

        def naive_group(chosen: torch.Tensor = chosen) -> torch.Tensor:
            return torch.cat([(chosen == expert).nonzero()[:, 0] for expert in range(experts)])

        yield Case(f"route {rows}", lambda x=logits: route(x, top_k, normalise=True), naive_route, is_comparable=False)
        yield Case(
            f"route_grouped {rows}",
            lambda x=logits: route_grouped(
                x, bias, top_k, normalise=False, num_groups=2, groups_kept=1, scale=1.0), naive_grouped,
            is_comparable=False,  # ties, in bfloat16
        )  # fmt: skip
        yield Case(f"group_by_expert {rows}", lambda c=chosen: group_by_expert(c, experts).tokens, naive_group)
        yield Case(
            f"grouped_matmul {rows}", lambda x=x, g=groups: grouped_matmul(x, weight, g.offsets, g.tokens), naive_matmul
        )  # fmt: skip
        yield Case(
            f"combine_experts {rows}", lambda r=products, p=groups.places, s=shares: combine_experts(r, p, s),
            lambda r=products, p=groups.places, s=shares: (r[p].float() * s[:, :, None]).sum(1).to(r.dtype),
        )  # fmt: skip


def _sampling(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    for rows in (1, 8):
        peaked = normal(rows, sizes.vocab, dtype=torch.float32) * 2
        peaked[:, : max(1, sizes.vocab // 1000)] += 8  # as a trained model's: a few that matter
        logits, index = peaked.to(dtype), torch.arange(rows)
        one, off = torch.ones(rows), torch.zeros(rows)
        k, p = torch.full((rows,), 50), torch.full((rows,), 0.9)
        cut, statistics = filter_cut(logits, one, k, p, off), softmax_statistics(logits)

        def naive_statistics(x: torch.Tensor = logits) -> tuple[torch.Tensor, ...]:
            wide = x.float()
            shares = torch.softmax(wide, -1)
            entropy = -(shares * torch.log(shares + 1e-30)).sum(-1)
            return wide.amax(-1), wide.argmax(-1), wide.logsumexp(-1), shares.amax(-1), entropy

        def statistics_of(x: torch.Tensor = logits) -> tuple[torch.Tensor, ...]:
            found = softmax_statistics(x)
            return found.maximum, found.argmax, found.log_sum_exp, found.confidence, found.entropy

        def naive_cut(x: torch.Tensor = logits, k: int = 50, p: float = 0.9) -> torch.Tensor:
            """As transformers does: k-th logit, then a sort, its softmax and running sum, and back."""
            wide = x.float()
            if k:
                wide = wide.masked_fill(wide < torch.topk(wide, min(k, x.shape[1])).values[:, -1:], -torch.inf)
            ordered, order = wide.sort(dim=-1)
            removed = torch.softmax(ordered, -1).cumsum(-1) <= 1 - p
            removed[:, -1] = False
            return ~torch.zeros_like(removed).scatter_(1, order, removed) & (wide > -torch.inf)

        def kept(x: torch.Tensor, k: torch.Tensor, one: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
            return keep_mask(x, filter_cut(x, one, k, p, torch.zeros_like(p)))

        name = f"{rows} x {sizes.vocab}"
        yield Case(f"softmax_statistics {name}", statistics_of, naive_statistics)
        for label, count in (("top-k, top-p", 50), ("top-p", 0)):
            every = torch.full_like(index, count)
            yield Case(
                f"filter_cut {label} {name}",
                lambda x=logits, k=every, one=one, p=p, kept=kept: kept(x, k, one, p),
                lambda naive=naive_cut, count=count: naive(k=count), is_comparable=False,  # ties
            )  # fmt: skip
        yield Case(
            f"keep_mask {name}", lambda x=logits, c=cut: keep_mask(x, c),
            lambda x=logits, c=cut: _naive_mask(x, c.threshold[:, None], c.last_tie[:, None]),
        )  # fmt: skip
        yield Case(
            f"gumbel_max {name}", lambda x=logits, i=index, one=one: gumbel_max(x, one, i, i, i),
            lambda x=logits: torch.multinomial(torch.softmax(x.float(), -1), 1)[:, 0], is_comparable=False,
        )  # fmt: skip
        yield Case(
            f"token_logprobs {name}",
            lambda x=logits, s=statistics: token_logprobs(x, s.argmax, s.log_sum_exp),
            lambda x=logits, s=statistics: torch.log_softmax(x.float(), -1).gather(1, s.argmax[:, None])[:, 0],
        )  # fmt: skip


def _naive_mask(x: torch.Tensor, threshold: torch.Tensor, last_tie: torch.Tensor) -> torch.Tensor:
    return (x > threshold) | ((x == threshold) & (torch.arange(x.shape[1]) <= last_tie))


def _selection(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    if dtype != torch.float32:  # confidences are
        return
    confidence = torch.rand(8, 32, generator=torch.Generator().manual_seed(0))
    is_open, limits = confidence > 0.2, {limit: torch.full((8,), limit) for limit in (3.0, 0.7, 1.5, 2.0)}

    def ranked() -> tuple[torch.Tensor, torch.Tensor]:
        return confidence.masked_fill(~is_open, -torch.inf).sort(dim=1, descending=True, stable=True)

    def chosen(accepted: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        accepted[:, 0] = True
        return torch.zeros_like(is_open).scatter_(1, order, accepted) & is_open

    def naive_count() -> torch.Tensor:
        _, order = ranked()
        return chosen((torch.arange(32) < 3).expand(8, 32).clone(), order)

    def naive_threshold() -> torch.Tensor:
        values, order = ranked()
        return chosen(values >= 0.7, order)

    def naive_factor() -> torch.Tensor:
        values, order = ranked()
        return chosen((values >= 1 - 1.5 / (torch.arange(32) + 2)).cumprod(1).bool(), order)

    def naive_entropy() -> torch.Tensor:
        values, order = confidence.masked_fill(~is_open, torch.inf).sort(dim=1, stable=True)
        return chosen(values.cumsum(1) <= 2.0, order)

    yield Case("select_count 8 x 32", lambda: select_count(confidence, is_open, limits[3.0]), naive_count)
    yield Case("select_threshold 8 x 32", lambda: select_threshold(confidence, is_open, limits[0.7]), naive_threshold)
    yield Case("select_factor 8 x 32", lambda: select_factor(confidence, is_open, limits[1.5]), naive_factor)
    yield Case("select_entropy 8 x 32", lambda: select_entropy(confidence, is_open, limits[2.0]), naive_entropy)


def _state_space(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    channels, size, tokens, width = sizes.channels, sizes.state, sizes.context // 2, 4
    a = -torch.arange(1.0, size + 1).repeat(channels, 1)
    weights = ScanWeights(a=a, skip=torch.ones(channels, dtype=dtype), dt_bias=torch.zeros(channels))
    conv, bias = normal(channels, width, dtype=dtype), normal(channels, dtype=dtype)
    batch = StateBatch(lengths=[tokens], slots=[0])
    x, dt, b, c = normal(tokens, 2 * channels + 2 * size, dtype=dtype).split([channels, channels, size, size], dim=1)

    def naive_scan() -> torch.Tensor:
        steps, state = F.softplus(dt.float()), torch.zeros(1, channels, size)
        wide = [part.float()[None] for part in (x, steps, b, c)]
        return looped_scan(wide[0], wide[1], a, wide[2], wide[3], weights.skip.float(), state)[0][0].to(dtype)

    def scanned() -> torch.Tensor:
        return selective_scan(x, dt, b, c, weights, torch.zeros(1, channels, size), batch)

    def naive_conv() -> torch.Tensor:
        padded = F.pad(x.T[None], (width - 1, 0))
        return F.silu(F.conv1d(padded, conv[:, None], bias, groups=channels))[0].T

    def convolved() -> torch.Tensor:
        return causal_conv(x, conv, bias, torch.zeros(1, channels, width - 1, dtype=dtype), batch)

    yield Case(f"selective_scan {tokens}", scanned, naive_scan)
    yield Case(f"causal_conv {tokens}", convolved, naive_conv)
    for rows in sizes.rows[:2]:
        states, slots = torch.zeros(rows, channels, size), torch.arange(rows)
        tails = torch.zeros(rows, channels, width - 1, dtype=dtype)
        one = tuple(part[:rows] for part in (x, dt, b, c))

        def naive_update(
            one: tuple[torch.Tensor, ...] = one, states: torch.Tensor = states, slots: torch.Tensor = slots
        ) -> torch.Tensor:
            x, dt, b, c = (part.float() for part in one)
            steps = F.softplus(dt + weights.dt_bias)[:, :, None]
            h = torch.exp(steps * a) * states[slots] + steps * x[:, :, None] * b[:, None]
            states[slots] = h
            return ((h * c[:, None]).sum(-1) + weights.skip.float() * x).to(dtype)

        def naive_step(
            x: torch.Tensor = one[0], tails: torch.Tensor = tails, slots: torch.Tensor = slots
        ) -> torch.Tensor:
            inputs = torch.cat((tails[slots], x[:, :, None]), dim=2)
            tails[slots] = inputs[:, :, 1:]
            return F.silu((inputs.float() * conv.float()).sum(-1) + bias.float()).to(dtype)

        yield Case(
            f"selective_update {rows}", lambda o=one, s=states, i=slots: selective_update(*o, weights, s, i),
            naive_update, is_comparable=False,  # each call goes on
        )  # fmt: skip
        yield Case(
            f"causal_conv_update {rows}",
            lambda x=one[0], t=tails, i=slots: causal_conv_update(x, conv, bias, t, i), naive_step,
            is_comparable=False,
        )  # fmt: skip


GROUPS = (_attention, _experts, _sampling, _selection, _state_space)
