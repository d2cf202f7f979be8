"""The public layouts of quantised matrices: how numbers, zeros and scales lie in tensors of a checkpoint.

Numbers of b bits are packed into words of 32, the first in the lowest bits:

                        words of numbers       words of zeros           scales           which group
    gptq                [in * b / 32, out]     [groups, out * b / 32]   [groups, out]    g_idx [in]
    awq                 [in, out * 4 / 32]     [groups, out * 4 / 32]   [groups, out]    inputs in order
    compressed-tensors  [out, in * b / 32]     [out * b / 32, groups]   [out, groups]    weight_g_idx [in]

AWQ's words hold outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight. GPTQ's zeros are stored one too low, but for the format
"gptq_v2". Numbers and zeros of compressed-tensors have a sign, and half of their range is added to both. Knows the
bits; where the tensors come from, and what reads the matrices, is said elsewhere.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from transfer.grouped_weights import GroupedWeight

WORD_BITS = 32
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of eight outputs, where in a word each is
Parts = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedLayout(ABC):
    """What the tensors of a matrix are called behind its own name, and how they are read.

    bits: of a number. group_size: of inputs, 0 for all of them. suffixes: of all tensors that a matrix may have, the
    first that of its numbers' words; packed: those of words; scales: that of the scales.
    """

    bits: int
    group_size: int
    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    packed: ClassVar[tuple[str, ...]]
    scales: ClassVar[str]

    @property
    @abstractmethod
    def needed(self) -> tuple[str, ...]:
        """Suffixes of the tensors without which there is no matrix."""

    @abstractmethod
    def shape(self, words: tuple[int, ...]) -> tuple[int, int]:
        """[out, in] of the matrix whose numbers' words have this shape."""

    @abstractmethod
    def shapes(self, out: int, inputs: int) -> Shapes:
        """What the tensors of such a matrix must be like, by suffix."""

    @abstractmethod
    def read(self, parts: Parts) -> GroupedWeight:
        """The matrix. Raises ValueError that begins with the suffix of the tensor which is wrong."""

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    def num_groups(self, inputs: int) -> int:
        return -(-inputs // self.group_size) if self.group_size else 1

    def in_order(self, inputs: int) -> torch.Tensor:
        """The group of each input where neighbours share one."""
        return torch.arange(inputs) // (self.group_size or max(1, inputs))

    def group_of(self, parts: Parts, suffix: str, inputs: int) -> torch.Tensor:
        """The group of each input, as stored under the suffix if it is."""
        groups = parts.get(suffix, self.in_order(inputs)).to(torch.int64)
        count = self.num_groups(inputs)
        if bool(((groups < 0) | (groups >= count)).any()):
            first, last = int(groups.min()), int(groups.max())
            raise ValueError(f"{suffix} names groups from {first} to {last}; there are {count}")
        return groups


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GptqLayout(PackedLayout):
    """has_low_zeros: they are stored one too low. is_symmetric: every zero is half of the numbers' range. is_reordered:
    inputs of a group lie apart, as g_idx says."""

    has_low_zeros: bool
    is_symmetric: bool
    is_reordered: bool
    name = "gptq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    packed = ("qweight", "qzeros")
    scales = "scales"

    @property
    def needed(self) -> tuple[str, ...]:
        return self.suffixes if self.is_reordered else self.suffixes[:3]

    def shape(self, words: tuple[int, ...]) -> tuple[int, int]:
        return words[1], words[0] * self.per_word

    def shapes(self, out: int, inputs: int) -> Shapes:
        groups, words = self.num_groups(inputs), self.per_word
        zeros, numbers = (groups, out // words), (inputs // words, out)
        return {"qweight": numbers, "qzeros": zeros, "scales": (groups, out), "g_idx": (inputs,)}

    def read(self, parts: Parts) -> GroupedWeight:
        zeros = _unpacked(parts["qzeros"], self.bits).flatten(1).T.contiguous()  # [out, G]
        half, largest = 1 << (self.bits - 1), (1 << self.bits) - 1
        # some writers name the format of low zeros and store them as they are: one group of zeros has one meaning
        if self.has_low_zeros and not (self.is_symmetric and bool((zeros == half).all())):
            zeros = (zeros + 1) & largest
        numbers = _unpacked(parts["qweight"], self.bits).permute(1, 0, 2).flatten(1)
        return GroupedWeight(
            bits=self.bits,
            numbers=numbers,
            scales=parts["scales"].T.float().contiguous(),
            zeros=zeros,
            groups=self.group_of(parts, "g_idx", numbers.shape[1]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AwqLayout(PackedLayout):
    """Of AWQ's version "gemm"."""

    bits: int = 4
    name = "awq"
    suffixes = ("qweight", "qzeros", "scales")
    packed = ("qweight", "qzeros")
    scales = "scales"

    @property
    def needed(self) -> tuple[str, ...]:
        return self.suffixes

    def shape(self, words: tuple[int, ...]) -> tuple[int, int]:
        return words[1] * self.per_word, words[0]

    def shapes(self, out: int, inputs: int) -> Shapes:
        groups, words = self.num_groups(inputs), out // self.per_word
        return {"qweight": (inputs, words), "qzeros": (groups, words), "scales": (groups, out)}

    def read(self, parts: Parts) -> GroupedWeight:
        numbers, zeros = (
            _unpacked(parts[name], self.bits)[..., AWQ_PLACES].flatten(1).T.contiguous() for name in self.packed
        )
        return GroupedWeight(
            bits=self.bits,
            numbers=numbers,
            scales=parts["scales"].T.float().contiguous(),
            zeros=zeros,
            groups=self.in_order(numbers.shape[1]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompressedLayout(PackedLayout):
    """Of compressed-tensors' format "pack-quantized". has_zeros: else all are half of the numbers' range. is_reordered:
    as GPTQ's."""

    has_zeros: bool
    is_reordered: bool
    name = "compressed-tensors"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    packed = ("weight_packed", "weight_zero_point")
    scales = "weight_scale"

    @property
    def needed(self) -> tuple[str, ...]:
        zeros = ("weight_zero_point",) if self.has_zeros else ()
        return (*self.suffixes[:3], *zeros, *(("weight_g_idx",) if self.is_reordered else ()))

    def shape(self, words: tuple[int, ...]) -> tuple[int, int]:
        return words[0], words[1] * self.per_word

    def shapes(self, out: int, inputs: int) -> Shapes:
        groups, words = self.num_groups(inputs), self.per_word
        return {
            "weight_packed": (out, inputs // words),
            "weight_scale": (out, groups),
            "weight_shape": (2,),
            "weight_zero_point": (out // words, groups),
            "weight_g_idx": (inputs,),
        }

    def read(self, parts: Parts) -> GroupedWeight:
        numbers = _unpacked(parts["weight_packed"], self.bits).flatten(1)
        if (stated := parts["weight_shape"].tolist()) != list(numbers.shape):
            raise ValueError(f"weight_shape says {stated}; the words hold {list(numbers.shape)}")
        scales = parts["weight_scale"].float()
        if "weight_zero_point" in parts:
            zeros = _unpacked(parts["weight_zero_point"].T, self.bits).flatten(1).T.contiguous()
        else:
            zeros = torch.full_like(scales, 1 << (self.bits - 1), dtype=torch.uint8)
        groups = self.group_of(parts, "weight_g_idx", numbers.shape[1])
        return GroupedWeight(bits=self.bits, numbers=numbers, scales=scales, zeros=zeros, groups=groups)


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, m] -> the numbers in each word, uint8 [n, m, 32 / bits]."""
    numbers = words.contiguous().flatten().view(torch.uint8).view(*words.shape, 4)
    if bits == 8:
        return numbers
    return torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(2)
