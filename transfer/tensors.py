"""PlaneSpec: the name, dtype and row shape of one tensor that travels row by row.

The same vocabulary serves tensors in flight and tensors at rest. Knows byte counts, not torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transfer.config import TransferConfig
from transfer.errors import ConfigError

DTYPE_BYTES: dict[str, int] = {
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8,
    "int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8, "bool": 1,
}  # fmt: skip
MAX_ROW_DIMS = 8
SEAL_BYTES = 16  # by how much a sealed frame is longer than its rows
MAX_ROW_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaneSpec:
    """One plane of a stream: `[rows, *row_shape]` of `dtype`.

    Raises ConfigError for an unknown dtype, an empty name or a dimension below 1.
    """

    name: str
    dtype: str
    row_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 128:
            raise ConfigError(f"a plane needs a name of 1 to 128 characters, not {self.name!r}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"plane {self.name!r}: unknown dtype {self.dtype!r}, use one of {', '.join(DTYPE_BYTES)}")
        shape = self.row_shape
        if not isinstance(shape, tuple) or len(shape) > MAX_ROW_DIMS or any(type(n) is not int or n < 1 for n in shape):
            raise ConfigError(f"plane {self.name!r}: row_shape must be a tuple of positive ints, not {shape!r}")
        if self.row_bytes > MAX_ROW_BYTES:
            raise ConfigError(f"plane {self.name!r}: a row of {self.row_bytes} bytes is beyond {MAX_ROW_BYTES}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.row_shape)

    def to_body(self) -> dict[str, object]:
        """Plain map for a message."""
        return {"name": self.name, "dtype": self.dtype, "row_shape": list(self.row_shape)}

    @classmethod
    def from_body(cls, body: object) -> PlaneSpec:
        """Strict inverse of to_body; ConfigError for anything else."""
        if not isinstance(body, Mapping) or set(body) != {"name", "dtype", "row_shape"}:
            raise ConfigError("a plane is a map of name, dtype and row_shape")
        if not isinstance(body["row_shape"], (list, tuple)):
            raise ConfigError("a plane's row_shape is a list of ints")
        if not isinstance(body["dtype"], str):
            raise ConfigError("a plane's dtype is a string")
        return cls(name=body["name"], dtype=body["dtype"], row_shape=tuple(body["row_shape"]))


def check_block_bytes(planes: Sequence[PlaneSpec], config: TransferConfig, seal_bytes: int = 0) -> None:
    """Raise ConfigError when a block of `planes` fits no message: one frame per plane, all in one message.

    seal_bytes: by how much sealing makes each frame longer.
    """
    sizes = {plane.name: config.block_size * plane.row_bytes + seal_bytes for plane in planes}
    for name, size in sizes.items():
        if size > config.max_message_bytes:
            raise ConfigError(
                f"a block of {config.block_size} rows of plane {name!r} is {size} bytes, beyond max_message_bytes "
                f"({config.max_message_bytes}): lower block_size or raise max_message_bytes, at both ends"
            )
    if sum(sizes.values()) > config.max_outbound_bytes:
        raise ConfigError(
            f"a block of {config.block_size} rows is {sum(sizes.values())} bytes, beyond max_outbound_bytes "
            f"({config.max_outbound_bytes}): lower block_size or raise max_outbound_bytes, at both ends"
        )
