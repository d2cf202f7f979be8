"""Reads ZMTP 3 (rfc.zeromq.org/spec/23) as it passes through the chaos proxy: where does which message end?

Plain connections only; frames of CURVE are encrypted and say nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from transfer.chaos.proxy import Direction
from transfer.errors import MalformedMessage
from transfer.protocol.messages import Block, Message, Probe
from transfer.protocol.wire import decode_header

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4


class ZmtpReader:
    """One direction of one link: bytes in, (offset of the end, message, size) out."""

    def __init__(self) -> None:
        self._offset = 0  # bytes taken so far
        self._waiting = b""
        self._in_greeting = True
        self._frames: list[bytes] = []
        self.last_frames: list[bytes] = []  # of the message yielded last

    def feed(self, data: bytes) -> Iterator[tuple[int, Message]]:
        """Messages completed by these bytes, and how many of `data` belong up to their end."""
        start = self._offset + len(self._waiting)
        self._waiting += data
        while (frame := self._next_frame()) is not None:
            flags, body = frame
            if flags & COMMAND:
                continue
            self._frames.append(body)
            if not flags & MORE:
                frames = self.last_frames = self._frames
                self._frames = []
                try:
                    yield self._offset - start, decode_header(frames[0], len(frames) - 1)
                except MalformedMessage as error:
                    raise AssertionError(f"the link carries what is no message: {error}") from error

    def _next_frame(self) -> tuple[int, bytes] | None:
        if self._in_greeting:
            if len(self._waiting) < GREETING_BYTES:
                return None
            self._in_greeting = False
            self._take(GREETING_BYTES)
        if len(self._waiting) < 2:
            return None
        flags = self._waiting[0]
        head = 9 if flags & LONG else 2
        if len(self._waiting) < head:
            return None
        size = int.from_bytes(self._waiting[1:head], "big")
        if len(self._waiting) < head + size:
            return None
        return flags, self._take(head + size)[head:]

    def _take(self, count: int) -> bytes:
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        self._offset += count
        return taken


class BlockTap:
    """A watch for ChaosProxy: counts the blocks that pass upwards, and cuts right after the last byte of some.

    `should_cut(block)` is asked once per block that passes.
    """

    def __init__(self, should_cut: Callable[[Block], bool] = lambda block: False) -> None:
        self.passed: Counter[tuple[str, int]] = Counter()  # by stream and index
        self.num_probes = 0
        self.bytes_up = 0
        self._should_cut = should_cut
        self._readers: dict[int, ZmtpReader] = {}

    def __call__(self, link: int, direction: Direction, data: bytes) -> int | None:
        if direction is not Direction.UP:
            return None
        for end, message in self._readers.setdefault(link, ZmtpReader()).feed(data):
            self.num_probes += isinstance(message, Probe)
            if isinstance(message, Block):
                self.passed[message.stream_id, message.index] += 1
                if self._should_cut(message):
                    self.bytes_up += end
                    return end
        self.bytes_up += len(data)
        return None
