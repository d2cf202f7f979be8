"""The transition tables, walked whole: every state with every event."""

from __future__ import annotations

import itertools

import pytest

from transfer.errors import LocalProtocolError, RemoteProtocolError
from transfer.protocol.state import (
    RECEIVER_TABLE,
    REMOTE_EVENTS,
    SENDER_TABLE,
    TERMINAL,
    ReceiverEvent,
    ReceiverState,
    SenderEvent,
    SenderState,
    apply,
)

# Written out by hand, independently of the tables: "state: event>state event>state ..."
SENDER = """
idle: open>opening fail>failed
opening: accept>accepted fail>failed
accepted: grant>granted announce>sending fail>failed
granted: grant>granted revoke>granted announce>sending fail>failed
sending: grant>sending revoke>sending send>sending ack>sending last_ack>draining close>done fail>failed
draining: revoke>sending close>done fail>failed
done:
failed:
"""
RECEIVER = """
registered: open>opened orphan>orphaned fail>failed
opened: grant>granted orphan>orphaned fail>failed
granted: revoke>granted announce>held orphan>orphaned fail>failed
held: grant>held revoke>held block>held admit>admitted finish>complete orphan>orphaned fail>failed
admitted: grant>admitted revoke>admitted block>admitted finish>complete orphan>orphaned fail>failed
orphaned: orphan>orphaned revoke>orphaned admit>orphaned open>opened restart>opened resume_held>held
orphaned: resume_admitted>admitted fail>failed
complete:
failed:
"""


def parse(text: str) -> dict[tuple[str, str], str]:
    expected = {}
    for line in text.strip().splitlines():
        state, _, moves = line.partition(":")
        for move in moves.split():
            event, _, following = move.partition(">")
            expected[state, event] = following
    return expected


CASES = [
    *(("sender", s, e) for s, e in itertools.product(SenderState, SenderEvent)),
    *(("receiver", s, e) for s, e in itertools.product(ReceiverState, ReceiverEvent)),
]


@pytest.mark.parametrize(("side", "state", "event"), CASES)
def test_every_state_with_every_event(side, state, event) -> None:  # type: ignore[no-untyped-def]
    table = SENDER_TABLE if side == "sender" else RECEIVER_TABLE
    expected = parse(SENDER if side == "sender" else RECEIVER).get((state.value, event.value))
    if expected is not None:
        assert apply(table, state, event).value == expected  # type: ignore[arg-type]
        return
    kind = RemoteProtocolError if event in REMOTE_EVENTS else LocalProtocolError
    with pytest.raises(kind, match=f"{state.value}.*{event.value}"):
        apply(table, state, event)  # type: ignore[arg-type]


def test_the_tables_cover_both_machines() -> None:
    assert {s for s, _ in SENDER_TABLE} | set(SENDER_TABLE.values()) == set(SenderState)
    assert {s for s, _ in RECEIVER_TABLE} | set(RECEIVER_TABLE.values()) == set(ReceiverState)
    for table in (SENDER_TABLE, RECEIVER_TABLE):
        left = {state for state, _ in table}
        assert not left & TERMINAL
        assert all(following in left or following in TERMINAL for following in table.values())
