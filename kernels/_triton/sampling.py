"""Softmax statistics, filter cuts and Gumbel-max draws over wide rows, each lane of a program keeping its own tally.

A row is split among as many programs as fill the device; a second, tiny kernel merges them. Lanes never talk to each
other inside the loop over the vocabulary. A cut is a descent over the bits of order-preserving integer keys, two bits
per pass, by one program per row: after the first pass the row comes from the second-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import ceil_div, next_power_of_2

BLOCK = 2048
CUT_BLOCK = 1024  # more spills
MAX_PARTS = 64
WARPS = 8
LOWEST = tl.constexpr(-3.4028234663852886e38)
FAR = tl.constexpr(-200.0)  # exp() of it is 0 in float32, and 0 times it is no NaN
NO_ID = tl.constexpr(2147483647)
SHIFTS = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}  # key bits that never differ in a dtype


@triton.jit
def statistics_kernel(logits_ptr, sums_ptr, place_ptr, row_stride, vocab, part_length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    end = tl.minimum(vocab, (part + 1) * part_length)
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(part * part_length, end, BLOCK):
        ids = start + lanes
        x = tl.load(logits_ptr + row * row_stride + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        x = tl.maximum(x, LOWEST)
        is_higher = x > best
        gap = tl.maximum(-tl.abs(x - best), FAR)
        weight = tl.exp(gap)  # of the lower of the two beside the higher
        spread = tl.where(is_higher, (spread + gap * mass) * weight, spread + gap * weight)
        mass = tl.where(is_higher, mass * weight + 1.0, mass + weight)
        place = tl.where(is_higher, ids, place)
        best = tl.maximum(best, x)
    highest = tl.max(best, axis=0)
    gap = tl.maximum(best - highest, FAR)
    weight = tl.exp(gap)
    slot = row * tl.num_programs(1) + part
    tl.store(sums_ptr + slot * 3, highest)
    tl.store(sums_ptr + slot * 3 + 1, tl.sum(mass * weight, axis=0))
    tl.store(sums_ptr + slot * 3 + 2, tl.sum((spread + gap * mass) * weight, axis=0))
    tl.store(place_ptr + slot, tl.min(tl.where(best == highest, place, NO_ID), axis=0))


@triton.jit
def merge_statistics_kernel(
    sums_ptr, place_ptr, maximum_ptr, argmax_ptr, lse_ptr, confidence_ptr, entropy_ptr, num_parts, PARTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    slots = row * num_parts + parts
    inside = parts < num_parts
    best = tl.load(sums_ptr + slots * 3, mask=inside, other=LOWEST)
    mass = tl.load(sums_ptr + slots * 3 + 1, mask=inside, other=0.0)
    spread = tl.load(sums_ptr + slots * 3 + 2, mask=inside, other=0.0)
    place = tl.load(place_ptr + slots, mask=inside, other=NO_ID)
    highest = tl.max(best, axis=0)
    gap = tl.maximum(best - highest, FAR)
    weight = tl.exp(gap)
    spread = tl.sum((spread + gap * mass) * weight, axis=0)
    mass = tl.sum(mass * weight, axis=0)
    is_empty = highest == LOWEST
    tl.store(maximum_ptr + row, tl.where(is_empty, float("-inf"), highest))
    tl.store(argmax_ptr + row, tl.min(tl.where(best == highest, place, NO_ID), axis=0).to(tl.int64))
    tl.store(lse_ptr + row, tl.where(is_empty, float("-inf"), highest + tl.log(mass)))
    tl.store(confidence_ptr + row, tl.where(is_empty, 0.0, 1.0 / mass))
    tl.store(entropy_ptr + row, tl.where(is_empty, 0.0, tl.log(mass) - spread / mass))


@triton.jit
def _noise(bits):
    """Standard Gumbel noise of 32 random bits, as kernels.philox.gumbel has it."""
    uniform = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.9999999403953552)
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333333 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.015625, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def draw_kernel(
    logits_ptr, temperature_ptr, seeds_ptr, samples_ptr, positions_ptr, threshold_ptr, last_tie_ptr, best_ptr,
    place_ptr, row_stride, vocab, part_length, CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    end = tl.minimum(vocab, (part + 1) * part_length)
    temperature = tl.load(temperature_ptr + row)
    seed = tl.load(seeds_ptr + row)
    groups = tl.arange(0, BLOCK // 4)
    sample = tl.zeros_like(groups) + tl.load(samples_ptr + row).to(tl.int32)
    position = tl.zeros_like(groups) + tl.load(positions_ptr + row).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(part * part_length, end, BLOCK):
        ids = start + lanes
        x = tl.load(logits_ptr + row * row_stride + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        a, b, c, d = tl.philox(seed, start // 4 + groups, position, sample, tl.zeros_like(groups))
        bits = tl.join(tl.join(a, c), tl.join(b, d)).reshape([BLOCK])  # a, b, c, d side by side
        if CUT:
            threshold = tl.load(threshold_ptr + row)
            is_kept = (x > threshold) | ((x == threshold) & (ids <= tl.load(last_tie_ptr + row)))
            x = tl.where(is_kept, x, float("-inf"))
        perturbed = x + temperature * _noise(bits)
        place = tl.where(perturbed > best, ids, place)
        best = tl.maximum(best, perturbed)
    highest = tl.max(best, axis=0)
    slot = row * tl.num_programs(1) + part
    tl.store(best_ptr + slot, highest)
    tl.store(place_ptr + slot, tl.min(tl.where(best == highest, place, NO_ID), axis=0))


@triton.jit
def merge_draws_kernel(best_ptr, place_ptr, out_ptr, num_parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    slots = row * num_parts + parts
    best = tl.load(best_ptr + slots, mask=parts < num_parts, other=float("-inf"))
    place = tl.load(place_ptr + slots, mask=parts < num_parts, other=NO_ID)
    tl.store(out_ptr + row, tl.min(tl.where(best == tl.max(best, axis=0), place, NO_ID), axis=0).to(tl.int64))


@triton.jit
def _block(row_ptr, ids, vocab):
    x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x == 0.0, 0.0, x)  # one zero


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """An int32 that orders as x does."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _descend(
    row_ptr, vocab, highest, sharpness, target, WEIGHED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The highest key at or above which lie `target` logits, or (WEIGHED) a mass of `target`."""
    lanes = tl.arange(0, BLOCK)
    key = tl.full([], -(1 << (31 - SHIFT)), tl.int32)
    for i in tl.static_range((32 - SHIFT) // 2):
        step = 1 << (30 - SHIFT - 2 * i)
        first = tl.zeros([BLOCK], tl.float32)
        second = tl.zeros([BLOCK], tl.float32)
        third = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            ids = start + lanes
            x = _block(row_ptr, ids, vocab)
            place = tl.where(ids < vocab, _key(x, SHIFT), key)
            weight = tl.exp((x - highest) * sharpness) if WEIGHED else tl.full([BLOCK], 1.0, tl.float32)
            first += tl.where(place >= key + step, weight, 0.0)
            second += tl.where(place >= key + step + step, weight, 0.0)
            third += tl.where(place >= key + step + step + step, weight, 0.0)
        key += tl.where(tl.sum(first, axis=0) >= target, step, 0)
        key += tl.where(tl.sum(second, axis=0) >= target, step, 0)
        key += tl.where(tl.sum(third, axis=0) >= target, step, 0)
    return key


@triton.jit
def _above(row_ptr, vocab, highest, sharpness, key, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """(count of logits above a key, their mass, mass of one logit at the key)."""
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    at_key = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + lanes
        x = _block(row_ptr, ids, vocab)
        place = tl.where(ids < vocab, _key(x, SHIFT), key - 1)
        weight = tl.exp((x - highest) * sharpness)
        count += tl.where(place > key, 1.0, 0.0)
        mass += tl.where(place > key, weight, 0.0)
        at_key = tl.maximum(at_key, tl.where(place == key, weight, 0.0))
    return tl.sum(count, axis=0), tl.sum(mass, axis=0), tl.max(at_key, axis=0)


@triton.jit
def cut_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, threshold_ptr, last_tie_ptr, row_stride, vocab,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    lanes = tl.arange(0, BLOCK)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where(temperature > 0, tl.where(top_k > 0, top_k, vocab), 1).to(tl.float32)
    sharpness = 1.0 / tl.maximum(temperature, 1e-30)

    best = tl.full([BLOCK], LOWEST, tl.float32)
    for start in range(0, vocab, BLOCK):
        best = tl.maximum(best, _block(row_ptr, start + lanes, vocab))
    highest = tl.max(best, axis=0)

    key = tl.full([], -(1 << (31 - SHIFT)), tl.int32)
    num_ties = tl.full([], vocab, tl.float32)  # `vocab` is no tensor where it is 1
    if top_k < vocab:
        key = _descend(row_ptr, vocab, highest, sharpness, top_k, False, SHIFT, BLOCK)
        above, _, _ = _above(row_ptr, vocab, highest, sharpness, key, SHIFT, BLOCK)
        num_ties = top_k - above
    if top_p < 1.0:
        _, mass, one = _above(row_ptr, vocab, highest, sharpness, key, SHIFT, BLOCK)
        target = tl.maximum(top_p * (mass + tl.where(top_k < vocab, num_ties, 0.0) * one), 1e-30)
        lower = _descend(row_ptr, vocab, highest, sharpness, target, True, SHIFT, BLOCK)
        _, mass, one = _above(row_ptr, vocab, highest, sharpness, lower, SHIFT, BLOCK)
        reach = tl.maximum(1.0, tl.ceil((target - mass) / tl.maximum(one, 1e-30)))
        num_ties = tl.where(lower > key, reach, tl.where(lower == key, tl.minimum(num_ties, reach), num_ties))
        key = tl.maximum(key, lower)

    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        x = _block(row_ptr, start + lanes, vocab)
        weight = tl.exp((x - highest) * sharpness)
        is_kept = (x > float("-inf")) & (_key(x, SHIFT) >= key) & ((weight >= min_p) | (x == highest))
        lowest = tl.minimum(lowest, tl.where(is_kept, x, float("inf")))
    threshold = tl.min(lowest, axis=0)
    num_ties = tl.where(_key(threshold, SHIFT) > key, vocab, num_ties)

    seen = 0.0
    last_tie = vocab - 1
    for start in range(0, vocab, BLOCK):
        ids = start + lanes
        is_tie = (_block(row_ptr, ids, vocab) == threshold) & (ids < vocab)
        rank = tl.cumsum(is_tie.to(tl.float32), axis=0) + seen
        last_tie = tl.minimum(last_tie, tl.min(tl.where(is_tie & (rank >= num_ties), ids, NO_ID), axis=0))
        seen += tl.sum(is_tie.to(tl.float32), axis=0)
    tl.store(threshold_ptr + row, threshold)
    tl.store(last_tie_ptr + row, last_tie.to(tl.int64))


def softmax_statistics(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """See kernels.sampling.softmax_statistics."""
    logits, parts, length = _split(logits)
    num_rows, device = logits.shape[0], logits.device
    sums = torch.empty(num_rows, parts, 3, dtype=torch.float32, device=device)
    place = torch.empty(num_rows, parts, dtype=torch.int32, device=device)
    found = {
        name: torch.empty(num_rows, dtype=torch.int64 if name == "argmax" else torch.float32, device=device)
        for name in ("maximum", "argmax", "log_sum_exp", "confidence", "entropy")
    }
    if num_rows:
        statistics_kernel[(num_rows, parts)](
            logits, sums, place, logits.stride(0), logits.shape[1], length, BLOCK=BLOCK, num_warps=WARPS
        )
        merge_statistics_kernel[(num_rows,)](
            sums, place, *found.values(), parts, PARTS=next_power_of_2(parts), num_warps=1
        )
    return found


def filter_cut(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> dict[str, torch.Tensor]:
    """See kernels.sampling.filter_cut."""
    logits = _rows(logits)
    num_rows, vocab = logits.shape
    threshold = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    last_tie = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        cut_kernel[(num_rows,)](
            logits, temperature.float().contiguous(), top_k.contiguous(), top_p.float().contiguous(),
            min_p.float().contiguous(), threshold, last_tie, logits.stride(0), vocab, SHIFT=SHIFTS[logits.dtype],
            BLOCK=min(CUT_BLOCK, next_power_of_2(vocab)), num_warps=WARPS,
        )  # fmt: skip
    return {"threshold": threshold, "last_tie": last_tie}


def gumbel_max(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    samples: torch.Tensor,
    positions: torch.Tensor,
    cut: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """See kernels.sampling.gumbel_max. cut: (threshold, last tie)."""
    logits, parts, length = _split(logits)
    num_rows, device = logits.shape[0], logits.device
    best = torch.empty(num_rows, parts, dtype=torch.float32, device=device)
    place = torch.empty(num_rows, parts, dtype=torch.int32, device=device)
    out = torch.empty(num_rows, dtype=torch.int64, device=device)
    temperature = temperature.float().contiguous()
    threshold, last_tie = (temperature, out) if cut is None else cut
    if num_rows:
        draw_kernel[(num_rows, parts)](
            logits, temperature, seeds.contiguous(), samples.contiguous(), positions.contiguous(), threshold, last_tie,
            best, place, logits.stride(0), logits.shape[1], length, CUT=cut is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        merge_draws_kernel[(num_rows,)](best, place, out, parts, PARTS=next_power_of_2(parts), num_warps=1)
    return out


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _split(logits: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(rows with neighbouring columns, parts per row, length of a part): enough parts to fill the device, none
    shorter than two blocks."""
    num_rows, vocab = logits.shape
    processors = 4
    if logits.is_cuda:
        processors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    wanted = ceil_div(4 * processors, max(1, num_rows))
    blocks = ceil_div(vocab, BLOCK)
    per_part = max(2, ceil_div(blocks, min(MAX_PARTS, wanted)))
    return _rows(logits), ceil_div(blocks, per_part), per_part * BLOCK
