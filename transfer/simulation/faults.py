"""Faults: what may go wrong in a run, how often each kind did, and what damage does to the bytes of a message.

A kind counts as fired only when it met something: a message that was under way, a stream that was open.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transfer.protocol.state import RECEIVER_TABLE, SENDER_TABLE, ReceiverEvent, SenderEvent

MESSAGE_KINDS = ("drop", "duplicate", "reorder", "truncate", "corrupt", "delay")
LINK_KINDS = ("partition", "partition_to_receiver", "partition_to_sender", "half_open")
HOST_KINDS = (
    "crash_sender",
    "crash_receiver",
    "restart_loop",
    "stop_sender",
    "stop_receiver",
    "clock_jump_sender",
    "clock_jump_receiver",
)
PRODUCER_KINDS = ("slow_producer",)
TAKE_OVER_KINDS = ("take_over_same_key", "take_over_other_key")
MEMORY_KINDS = ("lifeline_lost", "released_lost", "segment_refused", "replay")  # where memory is shared
INCIDENT_KINDS = (*LINK_KINDS, *HOST_KINDS, *TAKE_OVER_KINDS, "cancel")
CANCEL_KINDS = (
    *(f"cancel_by_sender_{s.value}" for s, e in SENDER_TABLE if e is SenderEvent.FAIL and s.value != "idle"),
    *(f"cancel_by_receiver_{s.value}" for s, e in RECEIVER_TABLE if e is ReceiverEvent.FAIL),
)
OTHER_KINDS = ("pool_exhaustion", "deadline", "misaligned_grant", "mismatched_blocks", "long_outage")
FAULT_KINDS = (
    *(*MESSAGE_KINDS, *LINK_KINDS, *HOST_KINDS, *PRODUCER_KINDS, *MEMORY_KINDS),
    *(*TAKE_OVER_KINDS, *CANCEL_KINDS, *OTHER_KINDS),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Probability of each fault per message; at most one happens to a message."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    truncate: float = 0.0
    corrupt: float = 0.0
    delay: float = 0.0

    def draw(self, dice: random.Random) -> str | None:
        """The fault of one message."""
        roll = dice.random()
        for kind in MESSAGE_KINDS:
            roll -= getattr(self, kind)
            if roll < 0:
                return kind
        return None

    @property
    def total(self) -> float:
        """Probability that something happens to a message."""
        return float(sum(getattr(self, kind) for kind in MESSAGE_KINDS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """Something that happens to a link, a host, a producer or a stream when the run has carried `at_message` messages.

    target: which link, host or request, modulo their number. seconds: how long it lasts, or how far a clock jumps.
    """

    kind: str
    at_message: int
    target: int
    seconds: float


def truncated(parcel: Sequence[bytes], dice: random.Random) -> list[bytes]:
    """A message cut short: within one of its frames, or before its last one."""
    frames = list(parcel)
    if len(frames) > 1 and dice.random() < 0.3:
        return frames[:-1]
    number = dice.choice([i for i, frame in enumerate(frames) if frame])
    frames[number] = frames[number][: dice.randrange(len(frames[number]))]
    return frames


def corrupted(parcel: Sequence[bytes], dice: random.Random) -> list[bytes]:
    """A message with one bit turned over."""
    frames = list(parcel)
    number = dice.choice([i for i, frame in enumerate(frames) if frame])
    damaged = bytearray(frames[number])
    damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
    frames[number] = bytes(damaged)
    return frames
