"""The messages, as plain frozen values; nothing here knows how they are encoded or carried.

Stream messages go between the two ends of one stream and always name it and its epoch; `Block` carries one raw
frame per plane. Service messages carry calls; `Call` and `Parts` may carry raw frames. Bodies are plain maps of
None, bool, int, float, str, bytes, lists and maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from transfer.protocol.negotiate import Offer

Body: TypeAlias = dict[str, Any]

WITHDRAWN: Body = {"generation": 0}  # in an Accept, in the place of a segment that was offered before


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """Sender to receiver: I hold the ticket (proof: 32 bytes), and this is what I can do.

    `nonce` (16 bytes) is drawn by this sender for this epoch; `deadline_ms` is the time left, None for no limit.
    """

    stream_id: str
    epoch: int
    proof: bytes
    nonce: bytes
    offer: Offer
    content_key: str
    deadline_ms: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Accept:
    """Receiver to sender: I hold the ticket too (proof over this and the Open), and this is what I can do.

    Blocks below `first_index` are stored already: go on there. `segment` and `data_address` say how to reach shared
    memory and the socket for sealed payloads; None where not offered. Said once more with the segment WITHDRAWN: that
    memory is given up before any of it was granted, so say Attached 0, and the payload goes over the wire.
    """

    stream_id: str
    epoch: int
    proof: bytes
    offer: Offer
    first_index: int
    segment: Body | None = None
    data_address: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Receiver to sender: the blocks for indexes first_index ... `allocated_tokens == len(block_ids) * block_size`."""

    stream_id: str
    epoch: int
    round: int
    first_index: int
    block_ids: tuple[int, ...]
    allocated_tokens: int
    block_size: int
    credit: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Revoke:
    """Receiver to sender: every grant of a round below `round` is withdrawn at and after `first_index`."""

    stream_id: str
    epoch: int
    serial: int
    round: int
    first_index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Revoked:
    """Sender to receiver: I will not fill those blocks under the old grants."""

    stream_id: str
    epoch: int
    serial: int
    first_index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Announce:
    """Sender to receiver: the totals, and the first grant echoed (`allocated_tokens` of round 0).

    A sender that takes over beyond index 0 needs no grant to announce, and echoes 0.
    """

    stream_id: str
    epoch: int
    total_rows: int
    allocated_tokens: int
    block_size: int
    items: tuple[Body, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Sender to receiver: rows first_row .. first_row + num_rows - 1 for block `index`; one frame per plane.

    `serial` counts what the stream sends under its epoch and never repeats. `tag` is empty where the payload is sealed
    or in shared memory.
    """

    stream_id: str
    epoch: int
    index: int
    block_id: int
    first_row: int
    num_rows: int
    serial: int
    tag: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Attached:
    """Sender to receiver, to an Accept with a segment: I have mapped it (0: not, so use the wire). Grants follow."""

    stream_id: str
    epoch: int
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Filled:
    """Sender to receiver: the rows of blocks first_index, ... lie in these slots, which are sealed with `serial`."""

    stream_id: str
    epoch: int
    first_index: int
    block_ids: tuple[int, ...]
    serial: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """Sender to receiver, after the end of a stream whose segment it had mapped: I hold no slot of it any more."""

    stream_id: str
    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ack:
    """Receiver to sender: every block below `next_index` is verified and stored, below `kept_index` for good.

    What lies between may still be revoked, so its rows must be kept. `serial` is the last revocation's (0: none): an
    Ack from before a revocation says nothing any more.
    """

    stream_id: str
    epoch: int
    serial: int
    next_index: int
    kept_index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Sender to receiver, on the path of the Blocks and in order with them: how far are you?

    `tag` proves the sender where payloads are sealed, and is empty elsewhere.
    """

    stream_id: str
    epoch: int
    nonce: int
    tag: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """Receiver to sender, to the Probe with this nonce: as an Ack; every grant that is not used up follows."""

    stream_id: str
    epoch: int
    nonce: int
    serial: int
    next_index: int
    kept_index: int


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
    """Caller to callee; ids rise from call to call. 0 is the keep-alive ping, whose answer nobody waits for."""

    call_id: int
    method: str
    body: Body


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One partial answer inside `Parts`, the `serial`th (from 0) of its call; its frames follow those of the parts
    before it.
    """

    call_id: int
    serial: int = 0
    body: Body
    num_frames: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Callee to caller: partial answers of one or many calls."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """Callee to caller: the call is over and went well, after `num_parts` partial answers."""

    call_id: int
    num_parts: int = 0
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Awaiting:
    """Caller to callee: I wait for the ends of these calls. Those that are not open there are answered in `Unknown`."""

    call_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """Callee to caller: none of these calls is open here. What still waits for one of them lost messages."""

    call_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """Callee to caller: I work on these calls (id, number of parts sent). Those that nobody waits for, or that lost
    parts, are answered with `Cancel`.
    """

    calls: tuple[tuple[int, int], ...]


StreamMessage: TypeAlias = (
    Open | Accept | Attached | Grant | Revoke | Revoked | Announce | Block | Filled | Released | Ack | Probe | Resume
    | Close | Abort
)  # fmt: skip
ServiceMessage: TypeAlias = Call | Parts | End | Fail | Cancel | Awaiting | Unknown | Serving
Message: TypeAlias = StreamMessage | ServiceMessage
