"""What computes an engine's KV, as one short digest: two engines that exchange KV must agree on it.

All that decides a key or a value besides the tokens: the configuration with its overrides, the tensors by name and
shape, an adapter by its numbers, how weights are stored, the dtype, how KV is stored, and how positions are rotated
(which a "dynamic" rotary scaling makes depend on the longest sequence that an engine serves). The weights' own numbers
are not read again: folders of one published model count as equal.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import blake2b

import torch

from kernels.quantised_matrix import Quantization
from language_worker.lora import AdaptedCheckpoint
from language_worker.models.base import LanguageModel
from transfer.checkpoint import Checkpoint

IDENTITY_BYTES = 8  # it tells mistakes apart, not forgeries


def kv_identity(
    checkpoint: Checkpoint,
    model: LanguageModel,
    *,
    quantization: Quantization,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> str:
    """Hex digest of a model whose positions are reserved."""
    tensors = sorted((t.name, tuple(t.shape), str(t.dtype)) for t in checkpoint.tensors.values())
    adapter = checkpoint.adapter.digest() if isinstance(checkpoint, AdaptedCheckpoint) else ""
    parts = [checkpoint.config(), tensors, adapter, quantization, str(dtype), str(kv_dtype)]
    described = json.dumps([*parts, asdict(model.spec.kv), model.described_positions()], sort_keys=True)
    return blake2b(described.encode(), digest_size=IDENTITY_BYTES).hexdigest()
