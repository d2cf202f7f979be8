"""OutgoingSlots: what a sender does for streams whose payload goes through a segment: join, fill, give back, let go.

Runs on the service's I/O thread. The order of things is what keeps memory safe: a slot is given back (Revoked,
Released) only when neither this thread nor the producer writes it any more. A receiver that missed the Released says
its last word again, and gets it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from transfer.connection import Connection
from transfer.errors import EndpointClosed, RemoteProtocolError, TransferError
from transfer.memory.segment_guest import MappedSegment, SegmentGuest
from transfer.memory.slot_writer import SlotWriter
from transfer.protocol.actions import Accepted, SenderAction, SendFilled
from transfer.protocol.messages import WITHDRAWN, Abort, Close, Grant, Released, Revoked, StreamMessage
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
        self._writing: set[tuple[str, int]] = set()  # epochs that are over, but whose producer writes slots still

    def join(self, stream: OutgoingStream, accepted: Accepted) -> None:
        """The receiver accepted; where it invites us to its segment, map that, or say that we cannot."""
        session = stream.session
        if accepted.segment is None or accepted.terms.payload != "shm":
            return

        def answer(mapped: MappedSegment | None) -> None:
            if session.state in TERMINAL:
                return
            actions = session.attached(0 if mapped is None else mapped.generation)
            if mapped is not None and actions:  # else it was withdrawn meanwhile
                stream.slots = SlotWriter(mapped, session.ticket, session.block_size, lambda: self._settle_soon(stream))
            self._run(stream, actions)

        if accepted.segment == WITHDRAWN:
            answer(None)
            return
        try:
            self._guest.accept(stream.connection, session.ticket, accepted.segment, session.offer, answer)
        except TransferError as error:
            self._run(stream, session.fail(error))

    def receive(self, stream: OutgoingStream, message: StreamMessage) -> Sequence[SenderAction]:
        """The receiver says something to the stream's session, which may so be granted slots."""
        session, num_rounds = stream.session, stream.session.num_rounds
        actions = session.receive(message, self._service.now())
        if isinstance(message, Grant) and stream.slots is not None and session.num_rounds > num_rounds:
            try:
                stream.slots.granted(message.first_index, message.block_ids)
            except RemoteProtocolError as error:
                return session.fail(error)
        return actions

    def leave(self, stream: OutgoingStream) -> None:
        """The receiver gave the segment up before it granted anything of it: nobody writes there, or ever did."""
        stream.slots = None

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
        if slots is None:
            return
        epoch = ticket.stream_id, ticket.epoch
        if not slots.end():
            self._writing.add(epoch)
            return
        stream.slots = None
        self._writing.discard(epoch)
        self._tell_released(stream.connection, *epoch)

    def last_word(self, stream: OutgoingStream | None, connection: Connection, message: Close | Abort) -> None:
        """A receiver says that an epoch is over, which it may be here as well: it may wait to hear who let go of slots.

        `stream`: what is open here under that id, whatever its epoch.
        """
        is_open = stream is not None and stream.session.ticket.epoch <= message.epoch
        epoch = message.stream_id, message.epoch
        if not is_open and epoch not in self._writing and self._guest.shares_memory(connection):
            self._tell_released(connection, *epoch)

    def _tell_released(self, connection: Connection, stream_id: str, epoch: int) -> None:
        with contextlib.suppress(TransferError):  # as if lost on the way: the receiver asks
            self._service.endpoint.send(connection, Released(stream_id=stream_id, epoch=epoch))

    def _settle_soon(self, stream: OutgoingStream) -> None:
        def step() -> None:
            if stream.slots is not None:
                stream.slots.settled()
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
