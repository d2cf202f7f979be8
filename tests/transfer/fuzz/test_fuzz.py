"""The kept corpus, and a sample of the fuzzing (the soak profile: the full counts)."""

from __future__ import annotations

import pytest

from tests.profiles import IS_SOAK
from tests.transfer.fuzz import corpus, decoder, session
from tests.transfer.fuzz.pairs import PAIRS
from tests.transfer.fuzz.samples import sample_messages
from transfer.protocol.messages import Message
from transfer.protocol.wire import SCHEMAS, WIRE_VERSION

DECODER_INPUTS = 5_000_000 if IS_SOAK else 100_000
SESSION_INPUTS = dict.fromkeys(PAIRS, 100_000) if IS_SOAK else {"wire": 2000, "sealed": 900, "segments": 1500}
SEED = 2026


@pytest.mark.parametrize("name", sorted(corpus.load()))
def test_the_kept_inputs(name: str) -> None:
    outcome = decoder.check_input(*corpus.load()[name])
    if name.startswith("valid-"):
        assert outcome not in ("malformed", "not sendable")
    else:
        assert outcome in ("malformed", *TOLERATED.get(name, ()))


TOLERATED = {"same-key-twice": ("Cancel",), "nan-in-a-body": ("End",)}  # the last value counts, as msgpack has it


def test_the_corpus_is_of_this_protocol_and_knows_every_message() -> None:
    valid = {name for name in corpus.load() if name.startswith("valid-")}
    assert valid == {f"valid-{name}" for name in sample_messages()}, "run python -m tests.transfer.fuzz.corpus"
    assert {header[0] for name, (_, header) in corpus.load().items() if name in valid} == {WIRE_VERSION}
    assert {type(message) for message, _ in sample_messages().values()} == {schema.kind for schema in SCHEMAS.values()}


@pytest.mark.timeout(3600)
def test_the_decoder_takes_any_bytes() -> None:
    figures = decoder.fuzz(DECODER_INPUTS, SEED)
    kinds = set(figures["outcomes"]) - {"malformed", "not sendable"}
    assert kinds == {kind.__name__ for kind in Message.__args__}, "every message must come up"
    assert figures["outcomes"]["malformed"] > DECODER_INPUTS // 3


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("payload", sorted(SESSION_INPUTS))
def test_live_sessions_take_any_messages(payload: str) -> None:
    figures = session.fuzz(SESSION_INPUTS[payload], SEED, payload)
    outcomes, dropped = figures["outcomes"], figures["dropped"]
    assert outcomes["complete"] > figures["streams"] // 4 and outcomes["malformed"] > 0
    for kind in ("AlignmentError", "RemoteProtocolError", "StreamTimeout", *OUTCOMES.get(payload, ())):
        assert outcomes[kind] > 0, f"no input led to {kind}: {outcomes}"
    for reason in ("bad_proof", "duplicate", "foreign_connection", "not_granted", "stale_epoch", *DROPPED[payload]):
        assert dropped[f"transfer_dropped_{reason}"] > 0, f"no input was dropped as {reason}: {dropped}"


OUTCOMES = {"segments": ("seal damaged", "lifeline lost", "PeerLost")}
DROPPED = {"wire": ("bad_tag",), "sealed": ("bad_tag", "wrong_path"), "segments": ("bad_seal", "wrong_path")}
