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
from transfer.wire import WIRE_VERSION, encode_header

FOLDER = Path(__file__).parent / "corpus"


def load() -> dict[str, tuple[int, bytes]]:
    """Name -> (number of frames, header)."""
    inputs = {path.stem: path.read_bytes() for path in sorted(FOLDER.glob("*.bin"))}
    assert inputs, f"{FOLDER} holds no inputs"
    return {name: (data[0], data[1:]) for name, data in inputs.items()}


def hostile_headers() -> dict[str, bytes]:
    """Headers that attack the decoder rather than the protocol."""
    version = bytes([WIRE_VERSION])
    return {
        "empty": b"",
        "version-only": version,
        "other-version": bytes([WIRE_VERSION + 1]) + msgpack.packb({"type": "cancel", "call_id": 1}),
        "pickle": version + pickle.dumps([1, 2, 3]),
        "deep-lists": version + b"\x91" * 2000 + b"\xc0",
        "deep-maps": version + b"\x81\xa1x" * 1000 + b"\xc0",
        "array-of-4-billion": version + b"\xdd\xff\xff\xff\xff",
        "map-of-4-billion": version + b"\xdf\xff\xff\xff\xff",
        "string-of-4-gigabytes": version + b"\xdb\xff\xff\xff\xff",
        "reserved-byte": version + b"\xc1",
        "extension": version + msgpack.packb(msgpack.ExtType(42, b"abc")),
        "timestamp": version + msgpack.packb({"type": "cancel", "call_id": msgpack.Timestamp(1)}),
        "bad-utf8": version + b"\x82\xa4type\xa6cancel\xa7call_id\xa1\xff",
        "key-is-a-number": version + msgpack.packb({1: 2}),
        "key-is-a-list": version + b"\x81\x90\xc0",
        "same-key-twice": version + b"\x83\xa4type\xa6cancel\xa7call_id\x01\xa7call_id\x02",
        "bytes-for-text": version + msgpack.packb({"type": b"cancel", "call_id": 1}),
        "trailing-bytes": version + msgpack.packb({"type": "cancel", "call_id": 1}) + b"\x00",
        "float-for-int": version + msgpack.packb({"type": "cancel", "call_id": 1.0}),
        "true-for-int": version + msgpack.packb({"type": "cancel", "call_id": True}),
        "nan-in-a-body": version + msgpack.packb({"type": "end", "call_id": 1, "body": {"x": float("nan")}}),
        "lone-surrogate": version + b"\x83\xa4type\xa3end\xa7call_id\x01\xa4body\x81\xa1x\xa3\xed\xa0\x80",
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
