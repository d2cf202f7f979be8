"""The stream protocol: states, events and the two transition tables. This docstring is its specification.

A stream carries rows from one sender to one receiver. Both ends hold the same ticket (stream id, epoch, secret).

    sender                                                receiver
    IDLE      -- Open(proof, offer) ------------------->  REGISTERED (ticket known) -> OPENED
    OPENING  <-- Accept(proof, offer, first index) -----  both ends compute the same terms from the two offers
    ACCEPTED <-- Grant round 0 (whole blocks) ----------  OPENED -> GRANTED, as soon as the pool can spare a block
    GRANTED   -- Announce(total, round 0 echoed) ------>  GRANTED -> HELD: the consumer may now reserve its buffer
    SENDING   -- Block 0, 1, ... (within credit) ------>  HELD: stored only; ADMITTED: handed on in row order, freed
             <-- Ack(next, kept), Grant round 1, 2 ... --  grants beyond round 0 only after the consumer admitted
    DRAINING <-- Close(total) --------------------------  ADMITTED -> COMPLETE (HELD -> COMPLETE for a stream of 0 rows)
    DONE

Rules. (1) allocated_tokens == len(block_ids) * block_size in every Grant, and a Grant goes on where the one before it
ended; the sender checks both by equality and answers a mismatch with Abort. (2) Announce echoes round 0's
allocated_tokens and the block size; the receiver compares by equality. (3) Block i holds rows i*block_size ...; all are
full but the last, which ends at the total. (4) At most `credit` blocks are unacknowledged. Ack means verified and
stored in the pool (below next_index), and for good (below kept_index: the sender forgets those rows). (5) Blocks that
are not expected (unknown stream, other epoch, other connection, duplicate, not granted, wrong size, wrong tag) are
dropped and counted; they never change a state. (6) Only the sender probes, when nothing moved for a while: it repeats
Open, or Announce, while they are unanswered, and sends Probe on the path of the Blocks. The receiver answers with
Accept, or with Resume and every grant (and Revoke) that is still open, or, for a stream that just ended, with the Close
or Abort it ended with. A Resume says that what was sent before its Probe and is not stored is lost: the sender sends
that again, once; a Resume to a Probe from before it did so makes it send nothing. (7) A stream keeps blocks only while
nobody else needs them more: Revoke withdraws grants from an index on, Revoked says that the sender heard it; until then
the stream is granted nothing, and blocks that the sender writes itself (shared memory) are not used again. A stream
that is not admitted may lose stored blocks, which are sent again later; an admitted one loses only what is not filled
(what was on its way is sent again), and its last block only after a turn in which it filled none. (8) Either side may
Abort at any time. A StreamTimeout ends a stream when its deadline passes, when the peer is silent for idle_timeout_s,
when no sender opens it for stream_timeout_s, when a block that was sent is not acknowledged for stream_timeout_s, and
when the receiver's own consumer or pool takes admit_timeout_s. A live sender may wait for its producer as long as the
producer's owner allows: its probes show that it lives. (9) An Open without a valid proof is refused (Abort to whoever
sent it) and changes nothing; an Accept without one is dropped. Offers that do not agree end the stream at both ends.

Take-over. A receiver with take_over_s does not fail when its sender is lost (silent, gone, or aborted with a code of
loss): it is ORPHANED. The old epoch ends at once: its messages are dropped, its unused grants return to the pool. A
ticket of the next epoch, which only the receiver issues, lets another sender go on. With the same (non-empty) content
key an admitted stream goes on at its next index; one that is announced and not admitted starts again at index 0 and
keeps its announcement; the new sender announces the same total (a take-over beyond index 0 echoes 0: it may need no
grant) or is refused with ResumeRejected. With another key, or none, the stream starts over: the consumer forgets it.
A stream whose every block is stored needs no sender any more, and its loss changes nothing.

`apply` is the only way from one state to another. An event that a state does not allow raises (LocalProtocolError for
our own events, RemoteProtocolError for the peer's) and leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from transfer.errors import LocalProtocolError, ProtocolError, RemoteProtocolError


class _Fast(Enum):
    """Members are looked up by identity: Enum's own hash is a Python function, and every block asks for some."""

    __hash__ = object.__hash__


class SenderState(_Fast):
    """Where a sender is."""

    IDLE = "idle"
    OPENING = "opening"
    ACCEPTED = "accepted"
    GRANTED = "granted"
    SENDING = "sending"
    DRAINING = "draining"
    DONE = "done"
    FAILED = "failed"


class SenderEvent(_Fast):
    """What can happen to a sender."""

    OPEN = "open"
    ACCEPT = "accept"
    GRANT = "grant"
    REVOKE = "revoke"
    ANNOUNCE = "announce"
    SEND = "send"
    ACK = "ack"
    LAST_ACK = "last_ack"
    CLOSE = "close"
    FAIL = "fail"


class ReceiverState(_Fast):
    """Where a receiver is."""

    REGISTERED = "registered"
    OPENED = "opened"
    GRANTED = "granted"
    HELD = "held"
    ADMITTED = "admitted"
    ORPHANED = "orphaned"
    COMPLETE = "complete"
    FAILED = "failed"


class ReceiverEvent(_Fast):
    """What can happen to a receiver."""

    OPEN = "open"
    GRANT = "grant"
    REVOKE = "revoke"
    ANNOUNCE = "announce"
    ADMIT = "admit"
    BLOCK = "block"
    ORPHAN = "orphan"
    RESUME_HELD = "resume_held"
    RESUME_ADMITTED = "resume_admitted"
    RESTART = "restart"
    FINISH = "finish"
    FAIL = "fail"


State = TypeVar("State", SenderState, ReceiverState)
Event = TypeVar("Event", SenderEvent, ReceiverEvent)

_S, _SE, _R, _RE = SenderState, SenderEvent, ReceiverState, ReceiverEvent

SENDER_TABLE: Mapping[tuple[SenderState, SenderEvent], SenderState] = {
    (_S.IDLE, _SE.OPEN): _S.OPENING,
    (_S.OPENING, _SE.ACCEPT): _S.ACCEPTED,
    (_S.ACCEPTED, _SE.GRANT): _S.GRANTED,
    (_S.ACCEPTED, _SE.ANNOUNCE): _S.SENDING,  # a take-over beyond index 0 may need no grant
    (_S.GRANTED, _SE.GRANT): _S.GRANTED,
    (_S.GRANTED, _SE.REVOKE): _S.GRANTED,
    (_S.GRANTED, _SE.ANNOUNCE): _S.SENDING,
    (_S.SENDING, _SE.GRANT): _S.SENDING,
    (_S.SENDING, _SE.REVOKE): _S.SENDING,
    (_S.SENDING, _SE.SEND): _S.SENDING,
    (_S.SENDING, _SE.ACK): _S.SENDING,
    (_S.SENDING, _SE.LAST_ACK): _S.DRAINING,
    (_S.SENDING, _SE.CLOSE): _S.DONE,  # the last Ack was lost: Close says the same and more
    (_S.DRAINING, _SE.REVOKE): _S.SENDING,  # stored, not admitted, and withdrawn: to be sent again
    (_S.DRAINING, _SE.CLOSE): _S.DONE,
    (_S.IDLE, _SE.FAIL): _S.FAILED,
    (_S.OPENING, _SE.FAIL): _S.FAILED,
    (_S.ACCEPTED, _SE.FAIL): _S.FAILED,
    (_S.GRANTED, _SE.FAIL): _S.FAILED,
    (_S.SENDING, _SE.FAIL): _S.FAILED,
    (_S.DRAINING, _SE.FAIL): _S.FAILED,
}

RECEIVER_TABLE: Mapping[tuple[ReceiverState, ReceiverEvent], ReceiverState] = {
    (_R.REGISTERED, _RE.OPEN): _R.OPENED,
    (_R.REGISTERED, _RE.ORPHAN): _R.ORPHANED,
    (_R.OPENED, _RE.GRANT): _R.GRANTED,
    (_R.OPENED, _RE.ORPHAN): _R.ORPHANED,
    (_R.GRANTED, _RE.REVOKE): _R.GRANTED,
    (_R.GRANTED, _RE.ANNOUNCE): _R.HELD,
    (_R.GRANTED, _RE.ORPHAN): _R.ORPHANED,
    (_R.HELD, _RE.GRANT): _R.HELD,  # round 0 of a sender that took over
    (_R.HELD, _RE.REVOKE): _R.HELD,
    (_R.HELD, _RE.BLOCK): _R.HELD,
    (_R.HELD, _RE.ADMIT): _R.ADMITTED,
    (_R.HELD, _RE.FINISH): _R.COMPLETE,  # zero rows: nothing to admit
    (_R.HELD, _RE.ORPHAN): _R.ORPHANED,
    (_R.ADMITTED, _RE.GRANT): _R.ADMITTED,
    (_R.ADMITTED, _RE.REVOKE): _R.ADMITTED,  # what is not filled yet
    (_R.ADMITTED, _RE.BLOCK): _R.ADMITTED,
    (_R.ADMITTED, _RE.FINISH): _R.COMPLETE,
    (_R.ADMITTED, _RE.ORPHAN): _R.ORPHANED,
    (_R.ORPHANED, _RE.ORPHAN): _R.ORPHANED,  # another ticket: the one before it is void
    (_R.ORPHANED, _RE.REVOKE): _R.ORPHANED,
    (_R.ORPHANED, _RE.ADMIT): _R.ORPHANED,
    (_R.ORPHANED, _RE.OPEN): _R.OPENED,  # nothing was announced: the consumer has nothing to forget
    (_R.ORPHANED, _RE.RESTART): _R.OPENED,
    (_R.ORPHANED, _RE.RESUME_HELD): _R.HELD,
    (_R.ORPHANED, _RE.RESUME_ADMITTED): _R.ADMITTED,
    (_R.REGISTERED, _RE.FAIL): _R.FAILED,
    (_R.OPENED, _RE.FAIL): _R.FAILED,
    (_R.GRANTED, _RE.FAIL): _R.FAILED,
    (_R.HELD, _RE.FAIL): _R.FAILED,
    (_R.ADMITTED, _RE.FAIL): _R.FAILED,
    (_R.ORPHANED, _RE.FAIL): _R.FAILED,
}

REMOTE_EVENTS: frozenset[SenderEvent | ReceiverEvent] = frozenset(
    {
        *(_SE.ACCEPT, _SE.GRANT, _SE.REVOKE, _SE.ACK, _SE.LAST_ACK, _SE.CLOSE),
        *(_RE.OPEN, _RE.ANNOUNCE, _RE.BLOCK, _RE.RESUME_HELD, _RE.RESUME_ADMITTED, _RE.RESTART),
    }
)
TERMINAL: frozenset[SenderState | ReceiverState] = frozenset({_S.DONE, _S.FAILED, _R.COMPLETE, _R.FAILED})


def apply(table: Mapping[tuple[State, Event], State], state: State, event: Event) -> State:
    """The state after `event`. Raises Local- or RemoteProtocolError where the table has no entry."""
    following = table.get((state, event))
    if following is not None:
        return following
    side = "sender" if isinstance(state, SenderState) else "receiver"
    kind: type[ProtocolError] = RemoteProtocolError if event in REMOTE_EVENTS else LocalProtocolError
    raise kind(f"a {side} in state {state.value!r} does not allow {event.value!r}")
