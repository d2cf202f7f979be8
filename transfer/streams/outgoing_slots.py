"""OutgoingSlots: what a sender does for streams whose payload goes through a segment: join, fill, give back, let go.

Runs on the service's I/O thread. The order of things is what keeps memory safe: a slot is given back (Revoked,
Released) only when neither this thread nor the producer writes it any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from transfer.errors import EndpointClosed, TransferError
from transfer.memory.segment_guest import MappedSegment, SegmentGuest
from transfer.memory.slot_writer import SlotWriter
from transfer.protocol.actions import Accepted, SenderAction, SendFilled
from transfer.protocol.messages import Released, Revoked, StreamMessage
from transfer.protocol.state import TERMINAL
from transfer.service.service import Service
from transfer.streams.outgoing_stream import OutgoingStream


class OutgoingSlots:
    """`run` executes a session's actions, `send` sends a message of a stream."""

    def __init__(
        self,
        service: Service,
        guest: SegmentGuest,
        run: Callable[[OutgoingStream, Sequence[SenderAction]], None],
        send: Callable[[OutgoingStream, StreamMessage], None],
    ) -> None:
        self._service = service
        self._guest = guest
        self._run = run
        self._send = send

    def join(self, stream: OutgoingStream, accepted: Accepted) -> None:
        """The receiver accepted; where it invites us to its segment, map that, or say that we cannot."""
        session = stream.session
        if accepted.segment is None or accepted.terms.payload != "shm":
            return

        def answer(mapped: MappedSegment | None) -> None:
            if session.state in TERMINAL:
                return
            if mapped is not None:
                stream.slots = SlotWriter(mapped, session.ticket, session.block_size, lambda: self._settle_soon(stream))
            self._run(stream, session.attached(0 if mapped is None else mapped.generation))

        try:
            self._guest.accept(stream.connection, session.ticket, accepted.segment, session.offer, answer)
        except TransferError as error:
            self._run(stream, session.fail(error))

    def send_filled(self, stream: OutgoingStream, action: SendFilled) -> None:
        """Write blocks into their slots, and say so."""
        assert stream.slots is not None, "only a stream that joined fills slots"
        for message in stream.slots.fill(action, stream.rows):
            self._send(stream, message)

    def confirm(self, stream: OutgoingStream, message: Revoked) -> None:
        """Answer a revocation, as soon as the producer does not write what is revoked."""
        stream.held = message
        self._confirm_held(stream)

    def let_go(self, stream: OutgoingStream) -> None:
        """The stream is over: say so of its slots, once its producer does not write them."""
        slots, ticket = stream.slots, stream.session.ticket
        if slots is None or not slots.end():
            return
        stream.slots = None
        with contextlib.suppress(TransferError):  # then the connection is gone, and the segment with it
            released = Released(stream_id=ticket.stream_id, epoch=ticket.epoch)
            self._service.endpoint.send(stream.connection, released)

    def _settle_soon(self, stream: OutgoingStream) -> None:
        def step() -> None:
            if stream.session.state in TERMINAL:
                self.let_go(stream)
            else:
                self._confirm_held(stream)

        with contextlib.suppress(EndpointClosed):
            self._service.post(step)

    def _confirm_held(self, stream: OutgoingStream) -> None:
        if stream.held is not None and stream.slots is not None and stream.slots.gives_back(stream.held, stream.rows):
            message, stream.held = stream.held, None
            self._send(stream, message)
