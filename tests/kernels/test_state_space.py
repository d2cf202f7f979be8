"""Selective scan and causal convolution against one-token-at-a-time float64 loops, however a sequence is split."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.causal_conv import causal_conv, causal_conv_update
from kernels.dispatch import Path, forced
from kernels.selective_scan import ScanWeights, selective_scan, selective_update
from kernels.state_batch import StateBatch
from tests import oracles_state_space as oracles
from tests.kernels.paths import WITH_NATIVE, paths, with_native
from tests.profiles import IS_SOAK
from tests.tolerances import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXAMPLES = 100 if IS_SOAK else 15


def _draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _weights(channels: int, size: int, dtype: torch.dtype, has_bias: bool) -> ScanWeights:
    a = -torch.exp(_draw(5, channels, size).clamp(-2, 2))
    bias = _draw(7, channels, dtype=dtype) if has_bias else None
    return ScanWeights(a=a, skip=_draw(6, channels, dtype=dtype), dt_bias=bias)


def _inputs(tokens: int, channels: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, dt, b, c, gate as views of one projection, as models have them."""
    fused = _draw(1, tokens, 3 * channels + 2 * size, dtype=dtype)
    return fused.split([channels, channels, size, size, channels], dim=1)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 5, 19]), max_size=4),
    channels=st.sampled_from([1, 5, 17]),
    size=st.sampled_from([1, 3, 16]),
    options=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    path=with_native,
)
def test_selective_scan(
    lengths: list[int],
    channels: int,
    size: int,
    options: tuple[bool, bool],
    dtype: torch.dtype,
    seed: int,
    path: Path,
) -> None:
    has_gate, has_bias = options
    slots = random.Random(seed).sample(range(len(lengths) + 2), len(lengths))
    weights = _weights(channels, size, dtype, has_bias)
    x, dt, b, c, gate = _inputs(sum(lengths), channels, size, dtype)
    states = torch.full((len(lengths) + 2, channels, size), math.nan)
    for slot in slots:
        states[slot] = _draw(slot, channels, size)
    before = states.clone()
    batch = StateBatch(lengths=lengths, slots=slots)
    with forced(path):
        y = selective_scan(x, dt, b, c, weights, states, batch, gate if has_gate else None)
    for tokens, slot in batch.spans():
        expected, last = oracles.selective_scan(
            *(part[tokens] for part in (x, dt, b, c)), weights.a, weights.skip, weights.dt_bias, before[slot],
            gate[tokens] if has_gate else None,
        )  # fmt: skip
        assert_matches(y[tokens], expected, reduced=8 * size)
        assert_matches(states[slot], last, reduced=16 * size)
    assert bool(states[[slot for slot in range(len(states)) if slot not in slots]].isnan().all())


@pytest.mark.parametrize("path", WITH_NATIVE)
def test_a_scan_in_pieces_is_the_scan_of_the_whole(path: Path) -> None:
    """Long enough that the Triton path cuts one sequence into several pieces; then split between calls and steps."""
    tokens, channels, size = 600, 3, 4
    weights = _weights(channels, size, torch.float32, True)
    inputs = _inputs(tokens, channels, size, torch.float32)
    x, dt, b, c, gate = inputs
    start = _draw(9, 3, channels, size)
    expected, last = oracles.selective_scan(x, dt, b, c, weights.a, weights.skip, weights.dt_bias, start[1], gate)
    with forced(path):
        states = start.clone()
        whole = selective_scan(x, dt, b, c, weights, states, StateBatch(lengths=[tokens], slots=[1]), gate)
        split_states, parts = start.clone(), []
        for first, end in ((0, 7), (7, 590), (590, tokens - 2)):
            xs, dts, bs, cs, gates = (part[first:end] for part in inputs)
            batch = StateBatch(lengths=[end - first], slots=[1])
            parts.append(selective_scan(xs, dts, bs, cs, weights, split_states, batch, gates))
        for token in (tokens - 2, tokens - 1):
            xs, dts, bs, cs, gates = (part[token : token + 1] for part in inputs)
            parts.append(selective_update(xs, dts, bs, cs, weights, split_states, torch.tensor([1]), gates))
    for y, end in ((whole, states), (torch.cat(parts), split_states)):
        assert_matches(y, expected, reduced=64)
        assert_matches(end[1], last, reduced=64)
        assert torch.equal(end[[0, 2]], start[[0, 2]])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    sequences=st.integers(0, 5),
    channels=st.sampled_from([1, 5, 17]),
    size=st.sampled_from([1, 3, 16]),
    has_gate=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    path=with_native,
)
def test_selective_update(
    sequences: int, channels: int, size: int, has_gate: bool, dtype: torch.dtype, seed: int, path: Path
) -> None:
    slots = random.Random(seed).sample(range(sequences + 2), sequences)
    weights = _weights(channels, size, dtype, True)
    x, dt, b, c, gate = _inputs(sequences, channels, size, dtype)
    states = torch.full((sequences + 2, channels, size), math.nan)
    for slot in slots:
        states[slot] = _draw(slot, channels, size)
    before = states.clone()
    chosen = torch.tensor(slots, dtype=torch.int64)
    with forced(path):
        y = selective_update(x, dt, b, c, weights, states, chosen, gate if has_gate else None)
    for i, slot in enumerate(slots):
        one = slice(i, i + 1)
        expected, last = oracles.selective_scan(
            *(part[one] for part in (x, dt, b, c)), weights.a, weights.skip, weights.dt_bias, before[slot],
            gate[one] if has_gate else None,
        )  # fmt: skip
        assert_matches(y[one], expected, reduced=8 * size)
        assert_matches(states[slot], last, reduced=size)
    assert bool(states[[slot for slot in range(len(states)) if slot not in slots]].isnan().all())


@settings(max_examples=2 * EXAMPLES, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 16, 17, 40]), max_size=4),
    channels=st.sampled_from([1, 5, 130]),
    width=st.sampled_from([2, 3, 4]),
    options=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    path=paths,
)
def test_causal_conv(
    lengths: list[int],
    channels: int,
    width: int,
    options: tuple[bool, bool],
    dtype: torch.dtype,
    seed: int,
    path: Path,
) -> None:
    has_bias, silu = options
    slots = random.Random(seed).sample(range(len(lengths) + 2), len(lengths))
    x = _draw(seed, sum(lengths), channels + 3, dtype=dtype)[:, 2 : 2 + channels]
    weight = _draw(1, channels, width, dtype=dtype)
    bias = _draw(2, channels, dtype=dtype) if has_bias else None
    tails = torch.full((len(lengths) + 2, channels, width - 1), math.nan, dtype=dtype)
    for slot in slots:
        tails[slot] = _draw(slot, channels, width - 1, dtype=dtype)
    before = tails.clone()
    batch = StateBatch(lengths=lengths, slots=slots)
    with forced(path):
        y = causal_conv(x, weight, bias, tails, batch, silu=silu)
    for tokens, slot in batch.spans():
        expected, tail = oracles.causal_conv(x[tokens], weight, bias, before[slot], silu)
        assert_matches(y[tokens], expected, reduced=4 * width)
        assert torch.equal(tails[slot].double(), tail)
    others = [slot for slot in range(len(tails)) if slot not in slots]
    assert bool(tails[others].isnan().all())
    with forced(path):  # one more token of each, in the order of the slots
        step = _draw(3, len(slots), channels, dtype=dtype)
        before = tails.clone()
        y = causal_conv_update(step, weight, bias, tails, torch.tensor(slots, dtype=torch.int64), silu=silu)
    for i, slot in enumerate(slots):
        expected, tail = oracles.causal_conv(step[i : i + 1], weight, bias, before[slot], silu)
        assert_matches(y[i : i + 1], expected, reduced=4 * width)
        assert torch.equal(tails[slot].double(), tail)
    assert bool(tails[others].isnan().all())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="distinct"):
        StateBatch(lengths=[1, 2], slots=[3, 3])
    with pytest.raises(ValueError, match="lengths"):
        StateBatch(lengths=[0], slots=[1])
    weights = _weights(2, 3, torch.float32, False)
    x, b, states = torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="the sequences have 3 tokens, the inputs 4"):
        selective_scan(x, x, b, b, weights, states, StateBatch(lengths=[3], slots=[0]))
    with pytest.raises(ValueError, match="slot 5 is beyond the 1"):
        selective_scan(x, x, b, b, weights, states, StateBatch(lengths=[4], slots=[5]))
    with pytest.raises(ValueError, match="do not fit"):
        selective_scan(x, x, b[:, :2], b, weights, states, StateBatch(lengths=[4], slots=[0]))
    with pytest.raises(ValueError, match="contiguous float32"):
        selective_scan(x, x, b, b, weights, states.double(), StateBatch(lengths=[4], slots=[0]))
    with pytest.raises(ValueError, match="tails must be contiguous"):
        causal_conv(x, torch.zeros(2, 4), None, states.half(), StateBatch(lengths=[4], slots=[0]))


@pytest.mark.parametrize("path", WITH_NATIVE)
def test_small_step_sizes_keep_their_digits(path: Path) -> None:
    """softplus(-14) is 8e-7: as log(1 + exp(-14)) in float32 it would be wrong by some percent in every channel."""
    tokens, channels, size = 40, 5, 3
    weights = ScanWeights(
        a=-torch.exp(_draw(5, channels, size)), skip=torch.zeros(channels), dt_bias=torch.linspace(-16, -7, channels)
    )
    x, dt, b, c, _ = _inputs(tokens, channels, size, torch.float32)
    dt = dt * 0.1
    states = torch.zeros(1, channels, size)
    with forced(path):
        selective_scan(x, dt, b, c, weights, states, StateBatch(lengths=[tokens], slots=[0]))
    _, last = oracles.selective_scan(
        x, dt, b, c, weights.a, weights.skip, weights.dt_bias, torch.zeros(channels, size), None
    )
    assert float(((states[0].double() - last) / last.abs().amax(-1, keepdim=True)).abs().max()) < 1e-5


def test_a_default_dtype_of_the_callers_changes_nothing() -> None:
    """Rooms for the C path are of the sizes that it writes."""
    weights = _weights(64, 16, torch.float32, True)
    x, dt, b, c, gate = _inputs(200, 64, 16, torch.float32)
    batch = StateBatch(lengths=[200], slots=[0])

    def run() -> torch.Tensor:
        with forced("native"):
            states = torch.zeros(1, 64, 16, dtype=torch.float32)
            return selective_scan(x, dt, b, c, weights, states, batch, gate)

    expected, before = run(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(run(), expected)
    finally:
        torch.set_default_dtype(before)
