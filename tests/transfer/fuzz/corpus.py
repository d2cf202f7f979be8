"""The kept corpus: one small file per input, `NAME.bin` = one byte (how many frames came along) and the header frame.

    python -m tests.transfer.fuzz.corpus          writes the files for the present version of the protocol

Names beginning with `valid-` are messages; the others are inputs that once were interesting (they must be refused or
decode; none may crash). What a fuzz run finds goes here by hand, with a name that says what it was.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import msgpack

from tests.transfer.fuzz.samples import sample_messages
from transfer.protocol.wire import WIRE_VERSION, encode_header, frame_header

FOLDER = Path(__file__).parent / "corpus"


def load() -> dict[str, tuple[int, bytes]]:
    """Name -> (number of frames, header)."""
    inputs = {path.stem: path.read_bytes() for path in sorted(FOLDER.glob("*.bin"))}
    assert inputs, f"{FOLDER} holds no inputs"
    return {name: (data[0], data[1:]) for name, data in inputs.items()}


def hostile_headers() -> dict[str, bytes]:
    """Headers that attack the decoder rather than the protocol."""
    return {
        "empty": b"",
        "version-only": bytes([WIRE_VERSION]),
        "wrong-checksum": bytes([WIRE_VERSION]) + bytes(4) + msgpack.packb({"type": "cancel", "call_id": 1}),
        "other-version": bytes([WIRE_VERSION + 1]) + frame_header(msgpack.packb({"type": "cancel", "call_id": 1}))[1:],
        "pickle": frame_header(pickle.dumps([1, 2, 3])),
        "deep-lists": frame_header(b"\x91" * 2000 + b"\xc0"),
        "deep-maps": frame_header(b"\x81\xa1x" * 1000 + b"\xc0"),
        "array-of-4-billion": frame_header(b"\xdd\xff\xff\xff\xff"),
        "map-of-4-billion": frame_header(b"\xdf\xff\xff\xff\xff"),
        "string-of-4-gigabytes": frame_header(b"\xdb\xff\xff\xff\xff"),
        "reserved-byte": frame_header(b"\xc1"),
        "extension": frame_header(msgpack.packb(msgpack.ExtType(42, b"abc"))),
        "timestamp": frame_header(msgpack.packb({"type": "cancel", "call_id": msgpack.Timestamp(1)})),
        "bad-utf8": frame_header(b"\x82\xa4type\xa6cancel\xa7call_id\xa1\xff"),
        "key-is-a-number": frame_header(msgpack.packb({1: 2})),
        "key-is-a-list": frame_header(b"\x81\x90\xc0"),
        "same-key-twice": frame_header(b"\x83\xa4type\xa6cancel\xa7call_id\x01\xa7call_id\x02"),
        "bytes-for-text": frame_header(msgpack.packb({"type": b"cancel", "call_id": 1})),
        "trailing-bytes": frame_header(msgpack.packb({"type": "cancel", "call_id": 1}) + b"\x00"),
        "float-for-int": frame_header(msgpack.packb({"type": "cancel", "call_id": 1.0})),
        "true-for-int": frame_header(msgpack.packb({"type": "cancel", "call_id": True})),
        "nan-in-a-body": frame_header(msgpack.packb({"type": "end", "call_id": 1, "body": {"x": float("nan")}})),
        "lone-surrogate": frame_header(b"\x83\xa4type\xa3end\xa7call_id\x01\xa4body\x81\xa1x\xa3\xed\xa0\x80"),
    }


def main() -> None:
    """Write every file anew."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.bin"):
        path.unlink()
    for name, (message, num_frames) in sample_messages().items():
        (FOLDER / f"valid-{name}.bin").write_bytes(bytes([num_frames]) + encode_header(message))
    for name, header in hostile_headers().items():
        (FOLDER / f"{name}.bin").write_bytes(b"\0" + header)


if __name__ == "__main__":
    main()
