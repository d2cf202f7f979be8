"""Outbox: what waits to be sent to one peer, bounded in messages and in bytes. Thread-safe, transport-free."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from transfer.connection import Frame
from transfer.errors import MessageTooLarge, Overloaded


class Outbox:
    """A FIFO of encoded messages (lists of frames) for `peer`. A message within `max_bytes` fits an empty outbox."""

    def __init__(self, peer: str, max_messages: int, max_bytes: int) -> None:
        self._peer = peer
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._queue: deque[tuple[Sequence[Frame], int]] = deque()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, frames: Sequence[Frame]) -> None:
        """Append one message. Raises MessageTooLarge when it can never fit, Overloaded when it does not fit now."""
        size = sum(len(frame) for frame in frames)
        if size > self._max_bytes:
            raise MessageTooLarge(
                f"a message of {size} bytes for {self._peer} is beyond max_outbound_bytes ({self._max_bytes})"
            )
        with self._lock:
            if len(self._queue) >= self._max_messages or self._num_bytes + size > self._max_bytes:
                raise Overloaded(
                    f"{len(self._queue)} messages of {self._num_bytes} bytes wait for {self._peer}, which does not "
                    "read them: wait, or drop the peer"
                )
            self._queue.append((frames, size))
            self._num_bytes += size

    def head(self) -> Sequence[Frame] | None:
        """The oldest message, left where it is."""
        return self._queue[0][0] if self._queue else None

    def pop(self) -> None:
        """Forget the oldest message."""
        with self._lock:
            self._num_bytes -= self._queue.popleft()[1]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._queue.clear()
            self._num_bytes = 0
