"""The public layouts of quantised matrices, restated: round in float64, pack bit by bit, and what the bits stand for.

Written from the formats' descriptions, in Python integers and numpy, sharing nothing with the reader. `quantise_folder`
turns a plain checkpoint into a pair: one in a layout, and one of the very numbers that it stands for.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LANGUAGE = r"(?:model\.|model\.language_model\.)layers\.\d+\..*_proj\.weight"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs the first, second, ... four bits of a word hold


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How matrices are quantised and stored. group_size: -1 for one group. desc_act: which inputs form a group is drawn
    by the name of what reads them, as inputs that are alike have it. low_zeros: those of GPTQ's first format."""

    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = False
    low_zeros: bool = True

    def section(self) -> dict[str, Any]:
        """What config.json says of it."""
        if self.method == "awq":
            return {
                "quant_method": "awq", "bits": self.bits, "group_size": self.group_size, "version": "gemm",
                "zero_point": not self.sym, "modules_to_not_convert": None,
            }  # fmt: skip
        if self.method == "compressed-tensors":
            weights = {
                "num_bits": self.bits, "type": "int", "symmetric": self.sym, "dynamic": False,
                "strategy": "channel" if self.group_size == -1 else "group",
                "group_size": None if self.group_size == -1 else self.group_size,
                "actorder": "group" if self.desc_act else None,
            }  # fmt: skip
            group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
            return {
                "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
                "config_groups": {"group_0": group}, "kv_cache_scheme": None,
            }  # fmt: skip
        section = {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.sym,
            "desc_act": self.desc_act, "damp_percent": 0.01, "static_groups": False, "true_sequential": True,
        }  # fmt: skip
        return section if self.low_zeros else {**section, "checkpoint_format": "gptq_v2"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Quantised:
    """numbers [out, in], zeros and scales [out, groups], groups [in]; weight: what they stand for, in float64."""

    numbers: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        zeros, scales = self.zeros[:, self.groups].astype(np.float64), self.scales[:, self.groups].astype(np.float64)
        return (self.numbers.astype(np.float64) - zeros) * scales


def quantise(weight: np.ndarray, scheme: Scheme, groups: np.ndarray) -> Quantised:
    """Each group rounded to evenly spaced numbers over its own range, with a scale of 16 bits."""
    num_groups, largest = int(groups.max()) + 1, 2**scheme.bits - 1
    zeros = np.zeros((len(weight), num_groups), dtype=np.int64)
    scales = np.zeros((len(weight), num_groups), dtype=np.float16)
    numbers = np.zeros(weight.shape, dtype=np.int64)
    for group in range(num_groups):
        part = weight[:, groups == group].astype(np.float64)
        if scheme.sym:
            steps = np.abs(part).max(1) / (largest // 2)
            zeros[:, group] = (largest + 1) // 2
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            steps = (high - low) / largest
            zeros[:, group] = np.clip(np.rint(-low / np.maximum(steps, 1e-12)), 1, largest)
        scales[:, group] = np.maximum(steps, 1e-4).astype(np.float16)
        rounded = np.rint(part / scales[:, group, None].astype(np.float64)) + zeros[:, group, None]
        numbers[:, groups == group] = np.clip(rounded, 0, largest)
    return Quantised(numbers=numbers, zeros=zeros, scales=scales, groups=groups)


def group_of_inputs(inputs: int, scheme: Scheme, seed: int) -> np.ndarray:
    """In order, or drawn, of equal sizes but the last."""
    size = inputs if scheme.group_size == -1 else scheme.group_size
    groups = np.arange(inputs) // size
    return np.random.default_rng(seed).permutation(groups) if scheme.desc_act else groups


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """[n, m * (32 / bits)] -> int32 [n, m]: the first number in the lowest bits."""
    per_word = 32 // bits
    packed = np.zeros((numbers.shape[0], numbers.shape[1] // per_word), dtype=np.uint32)
    for row in range(packed.shape[0]):
        for column in range(packed.shape[1]):
            word = 0
            for place in range(per_word):
                word |= int(numbers[row, column * per_word + place]) << (bits * place)
            packed[row, column] = word
    return packed.view(np.int32)


def store(quantised: Quantised, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of a matrix, by suffix."""
    if scheme.method == "compressed-tensors":
        return _compressed(quantised, scheme)
    if scheme.method == "awq":
        parts = {"qweight": _awq(quantised.numbers.T), "qzeros": _awq(quantised.zeros.T)}
    else:
        zeros = quantised.zeros - 1 if scheme.low_zeros else quantised.zeros
        parts = {"qweight": words(quantised.numbers, scheme.bits).T, "qzeros": words(zeros.T, scheme.bits)}
        parts["g_idx"] = quantised.groups.astype(np.int32)
    parts["scales"] = quantised.scales.T
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}


def _compressed(quantised: Quantised, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Its numbers have a sign and half of their range is added to both numbers and zeros, which are these again."""
    parts = {
        "weight_packed": words(quantised.numbers, scheme.bits),
        "weight_scale": quantised.scales,
        "weight_shape": np.array(quantised.numbers.shape, dtype=np.int64),
    }
    if not scheme.sym:
        parts["weight_zero_point"] = words(quantised.zeros.T, scheme.bits).T
    if scheme.desc_act:
        parts["weight_g_idx"] = quantised.groups.astype(np.int32)
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}


def _awq(numbers: np.ndarray) -> np.ndarray:
    """[n, m] int32 words along the second, each eight in AWQ's order."""
    return words(numbers.reshape(len(numbers), -1, 8)[:, :, list(AWQ_ORDER)].reshape(len(numbers), -1), 4)


def quantise_folder(
    plain: Path,
    target: Path,
    scheme: Scheme,
    *,
    names: str = LANGUAGE,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    section: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """(a folder whose matrices `names` are stored in the layout, a plain folder of what those stand for).

    change: of the stored tensors before they are written. section: further entries of what config.json says.
    """
    stored, exact = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not re.fullmatch(names, name) or tensor.dim() < 2:
            stored[name] = exact[name] = tensor
            continue
        source = re.sub(r"(?:[qkv]|gate|up)_proj", "shared", name)  # those that read the same inputs
        groups = group_of_inputs(tensor.shape[1], scheme, seed=sum(source.encode()))
        quantised = quantise(tensor.double().numpy(), scheme, groups)
        stored |= {name.removesuffix("weight") + kind: part for kind, part in store(quantised, scheme).items()}
        exact[name] = torch.from_numpy(quantised.weight).float()
        assert torch.equal(exact[name].double(), torch.from_numpy(quantised.weight)), "float32 holds it"
    if change is not None:
        change(stored)
    folders = target / "stored", target / "exact"
    for folder, tensors in zip(folders, (stored, exact), strict=True):
        shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {**scheme.section(), **(section or {})}
    (folders[0] / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folders
