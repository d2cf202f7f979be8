"""The messages, as plain frozen values; nothing here knows how they are encoded or carried.

Stream messages go between the two ends of one stream and always name it and its epoch; `Block` carries one raw
frame per plane. Service messages carry calls; `Call` and `Parts` may carry raw frames. Bodies are plain maps of
None, bool, int, float, str, bytes, lists and maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from transfer.tensors import PlaneSpec

Body: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """Sender to receiver: I hold the ticket (proof: 32 bytes), and this is the shape of what I will send."""

    stream_id: str
    epoch: int
    proof: bytes
    block_size: int
    planes: tuple[PlaneSpec, ...]
    content_key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Receiver to sender: the next blocks, in row order. `allocated_tokens == len(block_ids) * block_size`."""

    stream_id: str
    epoch: int
    round: int
    block_ids: tuple[int, ...]
    allocated_tokens: int
    block_size: int
    credit: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Announce:
    """Sender to receiver: the totals, and the first grant echoed (`allocated_tokens` of round 0)."""

    stream_id: str
    epoch: int
    total_rows: int
    allocated_tokens: int
    block_size: int
    items: tuple[Body, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Sender to receiver: rows first_row .. first_row + num_rows - 1 for block `index`; one frame per plane."""

    stream_id: str
    epoch: int
    index: int
    block_id: int
    first_row: int
    num_rows: int
    tag: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ack:
    """Receiver to sender: every block below `next_index` is verified and stored. Also the answer to a probe."""

    stream_id: str
    epoch: int
    next_index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Close:
    """Receiver to sender: all `total_rows` rows were handed to the consumer; the stream is over."""

    stream_id: str
    epoch: int
    total_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort:
    """Either way: the stream is over, without its rows."""

    stream_id: str
    epoch: int
    code: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Caller to callee. call_id 0 is the keep-alive ping, whose answer nobody waits for."""

    call_id: int
    method: str
    body: Body


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One partial answer inside `Parts`; its frames follow those of the parts before it."""

    call_id: int
    body: Body
    num_frames: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Callee to caller: partial answers of one or many calls."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """Callee to caller: the call is over and went well."""

    call_id: int
    body: Body


@dataclass(frozen=True, kw_only=True, slots=True)
class Fail:
    """Callee to caller: the call is over and failed; `code` is an error's class name."""

    call_id: int
    code: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancel:
    """Caller to callee: nobody waits for this call any more."""

    call_id: int


StreamMessage: TypeAlias = Open | Grant | Announce | Block | Ack | Close | Abort
ServiceMessage: TypeAlias = Call | Parts | End | Fail | Cancel
Message: TypeAlias = StreamMessage | ServiceMessage
