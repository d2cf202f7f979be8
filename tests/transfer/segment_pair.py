"""What tests of shared memory share: a Pair that always has segments, and short ways to its streams and its book."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.transfer.virtual import Consumer, Pair, make_rows
from transfer.memory.segment_area import SegmentArea
from transfer.memory.segment_host import SegmentHost
from transfer.protocol.messages import Message
from transfer.protocol.ticket import Ticket
from transfer.streams.stream_sender import OutgoingStream

Rows = Mapping[str, torch.Tensor]


class SegmentPair(Pair):
    """Payload goes through shared memory."""

    has_segments = True
    host: SegmentHost

    def begin(self, num_rows: int | None = None, *, admit: bool = True) -> tuple[OutgoingStream, Consumer]:
        """A stream that has its grants; announced if `num_rows` is given, and without rows."""
        ticket = Ticket.issue("test")
        consumer, stream = self.listen(ticket, admit=admit), self.send(ticket)
        if num_rows is not None:
            stream.announce(num_rows)
        self.network.settle()
        return stream, consumer

    def whole(self, num_rows: int, seed: int = 0, *, admit: bool = True) -> tuple[OutgoingStream, Consumer, Rows]:
        """A stream with all its rows written, which differ from those of other seeds."""
        stream, consumer = self.begin(num_rows, admit=admit)
        data = make_rows(num_rows, 1000 * (seed + 1))
        stream.write(0, data)
        self.network.settle()
        return stream, consumer, data

    def lose(self, *kinds: type[Message]) -> None:
        """From now on messages of these kinds get lost; none if none are given."""
        self.network.rewrite = (lambda m, f: None if isinstance(m, kinds) else (m, f)) if kinds else None

    @property
    def areas(self) -> list[SegmentArea]:
        """The receiver's segments."""
        return list(self.host.areas())

    @property
    def num_fenced(self) -> int:
        """Slots that nobody gets."""
        return self.receiver.stats()["transfer_slots_fenced"]

    @property
    def num_in_use(self) -> int:
        """Slots that streams hold."""
        return self.receiver.stats()["transfer_blocks_in_use"]


def part(rows: Rows, first: int, end: int) -> dict[str, torch.Tensor]:
    """Copies of some rows."""
    return {name: tensor[first:end].clone() for name, tensor in rows.items()}


def compute(views: Rows, data: Rows, first: int) -> int:
    """Put rows from `first` on where they are to be computed; the row after them."""
    num_rows = len(views["token_ids"])
    for name, view in views.items():
        view.copy_(data[name][first : first + num_rows])
    return first + num_rows
