"""Strays: messages for streams that are not open here, either not yet or no longer. Pure and bounded.

An Open that comes before its ticket is kept for a moment, with the Abort that may follow it; a stream that ended leaves
its last word, which is repeated to a sender that missed it. Strangers may send Opens, too, so their number is bounded
and so is what they describe: the planes of all of them together (about 500 bytes each at most).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from transfer.connection import Connection
from transfer.protocol.messages import Abort, Close, Open, Probe, StreamMessage
from transfer.protocol.refusals import epoch_is_over, refusal_of

MAX_PARKED_OPENS = 1024
MAX_PARKED_PLANES = 16384
PARKED_S = 5.0  # the sender repeats its Open anyway; this only spares the wait
MAX_LAST_WORDS = 4096


@dataclass(slots=True)
class _Parked:
    """An Open whose ticket is still to come, and its sender's Abort if that came too."""

    expires_s: float
    connection: Connection
    open: Open
    abort: Abort | None = None

    def may_end(self, connection: Connection, abort: Abort) -> bool:
        return connection == self.connection and abort.epoch == self.open.epoch


class Strays:
    """Early Opens and the last words of recent streams; counts what it drops in `dropped`."""

    def __init__(self, dropped: Counter[str]) -> None:
        self._dropped = dropped
        self._parked: OrderedDict[str, _Parked] = OrderedDict()
        self._num_planes = 0  # of all that is parked
        self._last_words: OrderedDict[str, tuple[Close | Abort, Connection | None]] = OrderedDict()

    @property
    def num_parked(self) -> int:
        """Opens waiting for their ticket."""
        return len(self._parked)

    def ended(self, last_word: Close | Abort, sender: Connection | None) -> None:
        """The stream of this sender ended here with this message."""
        self._last_words[last_word.stream_id] = last_word, sender
        if len(self._last_words) > MAX_LAST_WORDS:
            self._last_words.popitem(last=False)

    def sender_of(self, stream_id: str) -> Connection | None:
        """Whose stream this was, if it ended here."""
        return self._last_words.get(stream_id, (None, None))[1]

    def last_word(self, stream_id: str, epoch: int) -> Close | Abort:
        """What the sender of an epoch that is over is to hear, once more or at last."""
        last_word, _ = self._last_words.get(stream_id, (None, None))
        return last_word if last_word is not None and last_word.epoch == epoch else epoch_is_over(stream_id, epoch)

    def opened(self, stream_id: str) -> tuple[Connection, tuple[Open | Abort, ...]] | None:
        """A ticket came: what waited for it, if anything, in order."""
        self._last_words.pop(stream_id, None)
        parked = self._unpark(stream_id)
        if parked is None:
            return None
        return parked.connection, (parked.open, *([] if parked.abort is None else [parked.abort]))

    def answer(self, connection: Connection, message: StreamMessage, now: float) -> StreamMessage | None:
        """What to reply to a message for a stream that is not open here."""
        last_word, _ = self._last_words.get(message.stream_id, (None, None))
        if last_word is not None and last_word.epoch >= message.epoch:
            self._dropped["ended_stream"] += 1
            if last_word.epoch == message.epoch:
                return None if isinstance(message, Abort) else last_word
            return refusal_of(message) if isinstance(message, (Open, Probe)) else None
        parked = self._parked.get(message.stream_id)
        if isinstance(message, Abort) and parked is not None and parked.may_end(connection, message):
            parked.abort = message
        elif not isinstance(message, Open):
            self._dropped["unknown_stream"] += 1
        elif parked is None or parked.open.epoch < message.epoch:  # a later epoch's sender is the better guess
            self._unpark(message.stream_id)
            self._park(message.stream_id, _Parked(now + PARKED_S, connection, message))
        return None

    def expire(self, now: float) -> None:
        """Forget Opens whose ticket did not come in time."""
        while self._parked and next(iter(self._parked.values())).expires_s <= now:
            self._drop_oldest()

    def clear(self) -> None:
        """Forget everything."""
        self._parked.clear()
        self._num_planes = 0
        self._last_words.clear()

    def _park(self, stream_id: str, parked: _Parked) -> None:
        self._parked[stream_id] = parked
        self._num_planes += len(parked.open.offer.planes)
        while len(self._parked) > MAX_PARKED_OPENS or self._num_planes > MAX_PARKED_PLANES:
            self._drop_oldest()

    def _unpark(self, stream_id: str) -> _Parked | None:
        parked = self._parked.pop(stream_id, None)
        if parked is not None:
            self._num_planes -= len(parked.open.offer.planes)
        return parked

    def _drop_oldest(self) -> None:
        self._unpark(next(iter(self._parked)))
        self._dropped["unknown_stream"] += 1
