"""Tandem's own path in the transfer benchmark, through its public interface: tickets, grants, resume, checksums.

The receiver's blocks are handed to a consumer that reserves room at once and takes rows as they are: they lie in the
granted block then, which is where raw TCP puts them.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.transfer_memory import ITEM_BLOCKS, ROW_WIDTH, Content, Pool, Shape
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import TransferError
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import OutgoingStream, StreamSender
from transfer.tensors import PlaneSpec

PLANE = PlaneSpec(name="embeddings", dtype="bfloat16", row_shape=(ROW_WIDTH,))
WAIT_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of streams. is_shared: payload in memory that both processes map; in_place: rows are computed there."""

    curve: bool = False
    is_shared: bool = False
    has_checksums: bool = False
    in_place: bool = False

    def config(self, shape: Shape) -> TransferConfig:
        """Every default but the pools' sizes."""
        num_rows = shape.num_blocks * shape.block_rows
        return TransferConfig(
            block_size=shape.block_rows,
            pool_tokens=num_rows,
            shared_memory=self.is_shared,
            segment_tokens=num_rows,
            shm_checksum=self.has_checksums,
        )


class _Consumer:
    """One expected stream. `expected`: compare every block (in runs that are not timed)."""

    def __init__(self, owner: Receiver, stream_id: str, first: int, expected: Content | None) -> None:
        self._owner = owner
        self._stream_id = stream_id
        self._first = first
        self._expected = expected
        self.is_right = True
        self.error: TransferError | None = None
        self.over = threading.Event()

    def on_announce(self, total_rows: int, items: Sequence[Mapping[str, Any]]) -> None:
        self._owner.receiver.admit(self._stream_id)

    def on_rows(self, first_row: int, planes: Mapping[str, torch.Tensor]) -> None:
        if self._expected is not None:
            size = self._expected.shape.block_rows
            for i, block in enumerate(planes[PLANE.name].split(size), self._first + first_row // size):
                data = block.reshape(-1).view(torch.uint8).numpy()
                self.is_right = self.is_right and self._expected.matches(i, data)

    def on_restart(self) -> None:
        self.error = TransferError("the stream started over")
        self.over.set()

    def on_complete(self, stats: object) -> None:
        self.over.set()

    def on_failed(self, error: TransferError) -> None:
        self.error = error
        self.over.set()


class Receiver:
    """A StreamReceiver on an endpoint of its own."""

    def __init__(self, shape: Shape, address: str, kind: Kind) -> None:
        config = kind.config(shape)
        self._endpoint = open_endpoint(address, config, curve=kind.curve)
        self._service = Service(self._endpoint, config)
        self.receiver = StreamReceiver(self._service, config, [PLANE])
        self._service.start()
        self._expected: list[_Consumer] = []

    @property
    def address(self) -> str:
        return " ".join(filter(None, (self._endpoint.address, self._endpoint.public_key)))

    def allow(self, public_key: str) -> None:
        self._endpoint.allow([public_key])

    def expect(self, ticket: Ticket, first: int, expected: Content | None) -> None:
        """Open a stream; `receive` waits for it."""
        consumer = _Consumer(self, ticket.stream_id, first, expected)
        self._expected.append(consumer)
        self.receiver.open(ticket, consumer)

    def receive(self) -> bool:
        """Wait for every stream that is expected; whether all blocks were right. Raises what ended one."""
        consumers, self._expected = self._expected, []
        for consumer in consumers:
            if not consumer.over.wait(WAIT_S):
                raise TimeoutError(f"a stream is not over after {WAIT_S:g} s")
            if consumer.error is not None:
                raise consumer.error
        return all(consumer.is_right for consumer in consumers)

    def close(self) -> None:
        self._service.close()


class Sender:
    """A StreamSender on an endpoint of its own."""

    def __init__(self, pool: Pool, address: str, own_address: str, kind: Kind) -> None:
        self._pool = pool
        self._kind = kind
        self._config = kind.config(pool.content.shape)
        self._target, _, key = address.partition(" ")
        self._target_key = key or None
        self._endpoint = open_endpoint(own_address, self._config, curve=kind.curve)
        self._service = Service(self._endpoint, self._config)
        self._sender = StreamSender(self._service, self._config)
        self._service.start()

    @property
    def public_key(self) -> str | None:
        return self._endpoint.public_key

    def send(self, ticket: Ticket, first: int, count: int, *, is_open: bool = False) -> float:
        """Send one stream of whole blocks; seconds from its opening to the receiver's Close.

        is_open: opened before the clock starts, as an encoder does before it computes. In place, what it takes to fill
        the slots does not count: that is the encoder's computation.
        """
        started = time.perf_counter()
        stream = self._sender.open(ticket, self._target, self._target_key, [PLANE])
        if is_open:
            self._await_answer(stream.connection)
            if self._kind.in_place:
                _await_slots(stream)
            started = time.perf_counter()
        block_rows = self._pool.content.shape.block_rows
        stream.announce(count * block_rows)
        if self._kind.in_place:
            started += self._fill_slots(stream, first, count)
        else:
            for i in range(0, count, ITEM_BLOCKS):
                stream.write(i * block_rows, {PLANE.name: self._pool.rows(first + i, min(ITEM_BLOCKS, count - i))})
        stream.result(WAIT_S)
        return time.perf_counter() - started

    def _fill_slots(self, stream: OutgoingStream, first: int, count: int) -> float:
        """Put rows where the receiver wants them; the seconds of the copies, which stand for a computation."""
        block_rows = self._pool.content.shape.block_rows
        done, seconds = 0, 0.0
        while done < count:
            slots = stream.slot_rows(done * block_rows, (count - done) * block_rows)
            if slots is None:
                raise RuntimeError(f"the receiver granted no slot for block {done} of {count}")
            started = time.perf_counter()
            blocks = slots[PLANE.name].split(block_rows)
            for i, block in enumerate(blocks, first + done):
                block.copy_(self._pool.rows(i, 1))
            seconds += time.perf_counter() - started
            stream.write(done * block_rows, slots)
            done += len(blocks)
        return seconds

    def _await_answer(self, connection: Any) -> None:
        """A call's answer comes after the stream's first grant, on the same connection."""
        answered = threading.Event()
        self._service.call(connection, "ping", {}, on_end=lambda body, failure: answered.set())
        if not answered.wait(WAIT_S):
            raise TimeoutError(f"the receiver did not answer for {WAIT_S:g} s")

    def close(self) -> None:
        self._service.close()


def _await_slots(stream: OutgoingStream) -> None:
    """The first stream of a pair of processes has its slots only when both have mapped the memory."""
    deadline = time.monotonic() + WAIT_S
    while stream.slot_rows(0, 1) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the receiver granted no slots for {WAIT_S:g} s")
        time.sleep(0.001)
    stream.drop_slots()
