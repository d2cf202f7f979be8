"""What leaves a prefill engine and enters a decode engine: rows, and a header that says what they are.

    rows   | position 0 | position 1 | ... | position num_tokens - 1 | state, if there is any |
             one row of KVCache.read_rows each                         named tensors, as bytes

The last position of the prompt is not among them: the decode engine computes it, and so has the logits that choose the
first token, and nothing of sampling travels. Of a canvas, whose masks the decode engine all computes, every position of
the prompt is, and under guidance once more as it is without the prompt; under the policy `none` none is.

**State** is whatever else a sequence needs: `LAST_INPUT`, the embedding row of a prompt that ends with one; `MEDIA`,
all embedding rows of a canvas, since a refresh computes the prompt anew; and the recurrent state of models that have
any, under the names of their spec. The header is the first item of the announcement, before those of the media.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from language_worker.errors import KVMismatch
from language_worker.models.base import ModelSpec
from transfer.config import MIB, TransferConfig
from transfer.errors import TransferError
from transfer.memory.buffers import plane_of
from transfer.tensors import PlaneSpec

PLANE = "kv"
LAST_INPUT = "last_input"
MEDIA = "media"
MAX_STATE_TENSORS = 1024
POOL_BYTES = 256 * MIB  # of the receive pool, and of the memory shared with one peer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}


def kv_plane(dtype: torch.dtype, row_elements: int) -> PlaneSpec:
    """The one plane of a stream of KV."""
    return plane_of(PLANE, torch.empty((0, row_elements), dtype=dtype))


def kv_transfer(transfer: TransferConfig, plane: PlaneSpec) -> TransferConfig:
    """The transfer's settings for rows of KV: they are many times as large as those of media, so fewer are in hand."""
    most = max(1, POOL_BYTES // (plane.row_bytes * transfer.block_size)) * transfer.block_size
    return replace(
        transfer, pool_tokens=min(transfer.pool_tokens, most), segment_tokens=min(transfer.segment_tokens, most)
    )


def state_rows(spec: ModelSpec, kv_dtype: torch.dtype) -> int:
    """Rows that the recurrent state of one sequence takes at most."""
    num_bytes = 0 if spec.state is None else spec.state.num_bytes(torch.float32)
    return -(-num_bytes // spec.kv.bytes_per_token(kv_dtype))


def media_rows(spec: ModelSpec, dtype: torch.dtype, kv_dtype: torch.dtype, num_positions: int) -> int:
    """Rows that the embedding rows of so many positions take, where they go along."""
    if spec.mask_token_id is None or spec.media_token_id is None:
        return 0
    num_bytes = num_positions * len(spec.media_planes) * spec.hidden_size * dtype.itemsize
    return -(-num_bytes // spec.kv.bytes_per_token(kv_dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class KVHeader:
    """What the rows are. state: (plane) name, dtype and shape of each tensor behind the positions, in order. kv_of:
    what computed them, as `identity.kv_identity` says it. num_masks: of a canvas, those behind the prompt that its KV
    has seen."""

    num_tokens: int
    state: tuple[PlaneSpec, ...] = ()
    kv_of: str = ""
    num_masks: int = 0

    @classmethod
    def of(cls, num_tokens: int, state: Mapping[str, torch.Tensor], kv_of: str = "", num_masks: int = 0) -> KVHeader:
        """For `num_tokens` positions and tensors [*shape]."""
        planes = tuple(plane_of(name, t[None]) for name, t in state.items())
        return cls(num_tokens=num_tokens, state=planes, kv_of=kv_of, num_masks=num_masks)

    def num_state_rows(self, plane: PlaneSpec) -> int:
        return -(-sum(spec.row_bytes for spec in self.state) // plane.row_bytes)

    def to_body(self) -> dict[str, Any]:
        body = {"kv_tokens": self.num_tokens, "state": [spec.to_body() for spec in self.state], "kv_of": self.kv_of}
        return body | ({"masks": self.num_masks} if self.num_masks else {})

    @classmethod
    def from_body(cls, body: object) -> KVHeader:
        """Strict inverse of `to_body`; KVMismatch for anything else."""
        if not isinstance(body, Mapping) or set(body) - {"masks"} != {"kv_tokens", "state", "kv_of"}:
            raise KVMismatch("a stream of KV is announced by a map of kv_tokens, state, kv_of and, of a canvas, masks")
        num_tokens, state, kv_of, num_masks = body["kv_tokens"], body["state"], body["kv_of"], body.get("masks", 0)
        if type(num_masks) is not int or num_masks < 0:
            raise KVMismatch(f"a stream of KV was announced as that of a canvas of {num_masks!r} masks")
        if type(num_tokens) is not int or num_tokens < 0 or not isinstance(state, (list, tuple)):
            raise KVMismatch(f"a stream of KV was announced with {num_tokens!r} tokens and a {type(state).__name__}")
        if not isinstance(kv_of, str):
            raise KVMismatch(f"a stream of KV was announced as that of a {type(kv_of).__name__}, not of a digest")
        if len(state) > MAX_STATE_TENSORS:
            raise KVMismatch(f"a stream of KV was announced with {len(state)} tensors of state")
        try:
            planes = tuple(PlaneSpec.from_body(spec) for spec in state)
            return cls(num_tokens=num_tokens, state=planes, kv_of=kv_of, num_masks=num_masks)
        except TransferError as error:
            raise KVMismatch(f"the state of a stream of KV was announced wrongly: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedRows:
    """KV of a prompt's first positions, in host memory: rows [num_tokens, row_elements]. state: the recurrent state
    behind them, of models that have any, by name."""

    rows: torch.Tensor
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.rows.shape[0]


def pack_state(state: Mapping[str, torch.Tensor], plane: PlaneSpec) -> torch.Tensor:
    """The bytes of all tensors, one after the other, as rows of `plane` in host memory; the last is padded."""
    parts = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in state.values()]
    packed = torch.cat(parts)
    rows = torch.zeros(-(-packed.shape[0] // plane.row_bytes) * plane.row_bytes, dtype=torch.uint8)
    rows[: packed.shape[0]] = packed
    return rows.view(DTYPES[plane.dtype]).view(-1, *plane.row_shape)


def unpack_state(header: KVHeader, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `pack_state` was given, from the rows behind the positions."""
    data, state, first = rows.contiguous().view(-1).view(torch.uint8), {}, 0
    for spec in header.state:
        if spec.dtype not in DTYPES:
            raise KVMismatch(f"state {spec.name!r} came in {spec.dtype}, which no engine computes in")
        dtype = DTYPES[spec.dtype]
        part = data[first : first + math.prod(spec.row_shape) * dtype.itemsize].clone()
        state[spec.name] = part.view(dtype).view(spec.row_shape)
        first += part.shape[0]
    return state
