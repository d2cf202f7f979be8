"""One message of every kind, as it might travel: what the corpus and the mutators start from."""

from __future__ import annotations

from dataclasses import replace

from tests.transfer.virtual import PLANES
from transfer.protocol.messages import (
    Abort,
    Accept,
    Ack,
    Announce,
    Attached,
    Awaiting,
    Block,
    Call,
    Cancel,
    Close,
    End,
    Fail,
    Filled,
    Grant,
    Message,
    Open,
    Part,
    Parts,
    Probe,
    Released,
    Resume,
    Revoke,
    Revoked,
    Serving,
    Unknown,
)
from transfer.protocol.negotiate import Offer

STREAM = {"stream_id": "0123456789abcdef" * 2, "epoch": 1}
OFFER = Offer(block_size=16, planes=PLANES, max_frame_bytes=1 << 20, credit=8)


def sample_messages() -> dict[str, tuple[Message, int]]:
    """Name -> (message, number of frames that come with it)."""
    everything = {"a": [1, -2.5, None, True, b"x", "é"], "b": {"c": {"d": [[], {}]}}}
    opened = Open(**STREAM, proof=b"p" * 32, nonce=b"n" * 16, offer=OFFER, content_key="media", deadline_ms=5000)  # type: ignore[arg-type]
    return {
        "open": (opened, 0),
        "open-without-deadline": (replace(opened, deadline_ms=None, content_key=""), 0),
        "accept": (Accept(**STREAM, proof=b"q" * 32, offer=OFFER, first_index=3), 0),  # type: ignore[arg-type]
        "accept-with-paths": (
            Accept(
                **STREAM, proof=b"q" * 32, offer=OFFER, first_index=0, segment={"path": "/x"}, data_address="tcp://h:1"
            ),  # type: ignore[arg-type]
            0,
        ),
        "grant": (
            Grant(**STREAM, round=1, first_index=4, block_ids=(7, 0, 9), allocated_tokens=48, block_size=16, credit=8),  # type: ignore[arg-type]
            0,
        ),
        "revoke": (Revoke(**STREAM, serial=1, round=2, first_index=5), 0),  # type: ignore[arg-type]
        "revoked": (Revoked(**STREAM, serial=1, first_index=5), 0),  # type: ignore[arg-type]
        "announce": (
            Announce(**STREAM, total_rows=100, allocated_tokens=64, block_size=16, items=({"grid": [1, 2, 3]}, {})),  # type: ignore[arg-type]
            0,
        ),
        "block": (
            Block(**STREAM, index=1, block_id=7, first_row=16, num_rows=16, serial=2, tag=b"12345678"),  # type: ignore[arg-type]
            2,
        ),
        "block-untagged": (
            Block(**STREAM, index=0, block_id=7, first_row=0, num_rows=16, serial=1, tag=b""),  # type: ignore[arg-type]
            2,
        ),
        "ack": (Ack(**STREAM, serial=1, next_index=4, kept_index=3), 0),  # type: ignore[arg-type]
        "probe": (Probe(**STREAM, nonce=99), 0),  # type: ignore[arg-type]
        "probe-tagged": (Probe(**STREAM, nonce=99, tag=b"t" * 16), 0),  # type: ignore[arg-type]
        "attached": (Attached(**STREAM, generation=3), 0),  # type: ignore[arg-type]
        "filled": (Filled(**STREAM, first_index=2, block_ids=(4, 5), serial=6), 0),  # type: ignore[arg-type]
        "released": (Released(**STREAM), 0),  # type: ignore[arg-type]
        "resume": (Resume(**STREAM, nonce=99, serial=1, next_index=4, kept_index=4), 0),  # type: ignore[arg-type]
        "close": (Close(**STREAM, total_rows=100), 0),  # type: ignore[arg-type]
        "abort": (Abort(**STREAM, code="StreamTimeout", message="é" * 40), 0),  # type: ignore[arg-type]
        "call": (Call(call_id=2**63 - 1, method="embed", body=everything), 3),
        "ping": (Call(call_id=0, method="ping", body={}), 0),
        "parts": (Parts(parts=(Part(call_id=1, body=everything, num_frames=2), Part(call_id=2, serial=8, body={}))), 2),
        "end": (End(call_id=1, num_parts=2, body=everything), 0),
        "fail": (Fail(call_id=1, code="Overloaded", message="later"), 0),
        "cancel": (Cancel(call_id=1), 0),
        "awaiting": (Awaiting(call_ids=(1, 2**63 - 1)), 0),
        "unknown": (Unknown(call_ids=(1,)), 0),
        "serving": (Serving(calls=((1, 0), (7, 2**63 - 1))), 0),
    }
