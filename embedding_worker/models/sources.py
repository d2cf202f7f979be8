"""Reading a model whose tensors lie in several checkpoints: its own, and that of the encoder it was made with."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from transfer.checkpoint import Checkpoint, check_checkpoint, load_checkpoint
from transfer.checkpoint_rules import Rule

Source = tuple[Checkpoint, dict[str, tuple[int, ...]], list[Rule], tuple[str, ...]]  # shapes to fill, names of others


def load_sources(
    sources: Iterable[Source], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of all, and a fingerprint of each. Raises CheckpointError."""
    weights: dict[str, torch.Tensor] = {}
    fingerprints = []
    for checkpoint, shapes, rules, foreign in sources:
        own = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        fingerprints.append(load_checkpoint(checkpoint, own, rules, foreign=foreign, fingerprint=True).fingerprint)
        weights |= own
    return weights, fingerprints


def check_sources(sources: Iterable[Source]) -> int:
    """How many tensors `load_sources` would read; raises what it would, from the headers alone."""
    num_tensors = 0
    for checkpoint, shapes, rules, foreign in sources:
        own = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        num_tensors += len(check_checkpoint(checkpoint, own, rules, foreign=foreign)[0])
    return num_tensors
