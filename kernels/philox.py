"""Philox4x32-10 (Salmon et al., 2011): random bits as a pure function of a key and a counter.

No state, so a number depends on what it is for alone (request, sample, position, token id), never on the batch, the
device or what was drawn before. Triton's own Philox is the same function; this is its twin for tensors anywhere. On the
CPU numpy computes the bits, in half the time that torch's calls on 64-bit numbers take.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

ROUNDS = 10
_MASK = 0xFFFF_FFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_Words = TypeVar("_Words", torch.Tensor, npt.NDArray[np.int64])


def philox(
    seed: torch.Tensor, counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four words of random bits per counter.

    seed: int64, its 64 bits are the key. counter: four int64 tensors of words, the low 32 bits of each are used. All
    broadcast. Returns four int64 tensors with values in [0, 2^32).
    """
    if not seed.is_cpu:
        return _words(seed, *counter)
    shape = np.broadcast_shapes(seed.shape, *(word.shape for word in counter))
    found = _words(*(np.atleast_1d(word.numpy()) for word in (seed, *counter)))  # numpy warns of numbers that wrap
    first, second, third, fourth = (torch.from_numpy(word).view(shape) for word in found)
    return first, second, third, fourth


def _words(seed: _Words, c0: _Words, c1: _Words, c2: _Words, c3: _Words) -> tuple[_Words, _Words, _Words, _Words]:
    key = (seed, seed >> 32)
    c0, c2 = c0 & _MASK, c2 & _MASK
    for _ in range(ROUNDS):
        # Products wrap at 64 bits, which keeps every bit that is taken; c1, c3 and the keys may hold more than their
        # word, as they are only xored into what is cut to a word next.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (second >> 32) ^ (c1 ^ key[0])
        c2 = (first >> 32) ^ (c3 ^ key[1])
        c0 &= _MASK
        c2 &= _MASK
        c1, c3 = second, first
        key = (key[0] + _WEYL[0], key[1] + _WEYL[1])
    return c0, c1 & _MASK, c2, c3 & _MASK


def gumbel(seed: torch.Tensor, position: torch.Tensor, sample: torch.Tensor, token_id: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32, of (seed, position, sample, token id); all int64, broadcast together.

    The counter is (token id // 4, position, sample, 0); the token takes word `token id % 4` of the four.
    """
    words = philox(seed, (token_id >> 2, position, sample, torch.zeros_like(token_id)))
    lane = token_id & 3
    bits = torch.where(lane < 2, torch.where(lane == 0, words[0], words[1]), torch.where(lane == 2, words[2], words[3]))
    return gumbel_of(_uniform(bits.float()))


def uniform_rows(
    seeds: torch.Tensor, positions: torch.Tensor, samples: torch.Tensor, first: int, count: int
) -> torch.Tensor:
    """What `gumbel_of` makes into the noise of token ids first .. first + count - 1 for every row: [R, count] float32.

    seeds, positions, samples: [R] int64. `first` is a multiple of 4. A quarter of the work of `gumbel`.
    """
    groups = torch.arange(first // 4, -(-(first + count) // 4), device=seeds.device)[None]
    words = philox(seeds[:, None], (groups, positions[:, None], samples[:, None], torch.zeros_like(groups)))
    numbers = torch.empty(seeds.shape[0], groups.shape[1], len(words), device=seeds.device)
    for lane, word in enumerate(words):
        numbers[:, :, lane] = word
    return _uniform(numbers.flatten(1))[:, :count]


def gumbel_of(uniform: torch.Tensor) -> torch.Tensor:
    """-log(-log(1 - u)); at most -log(u)."""
    return uniform.neg().log1p_().neg_().log_().neg_()


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """Of 32 random bits as float32, in place: in (0, 1), fine grained near 0, which becomes the largest noise."""
    return bits.mul_(2.0**-32).add_(2.0**-33).clamp_max_(1.0 - 2.0**-24)


GUMBEL_BOUND = 22.9  # no noise is larger: -log(2^-33), rounded up
