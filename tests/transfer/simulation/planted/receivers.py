"""Bugs of a receiver. See `tests.transfer.simulation.planted`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from transfer.protocol import take_over
from transfer.protocol.actions import ReceiverAction, Restarted
from transfer.protocol.messages import Ack, Block
from transfer.protocol.receiver_life import ReceiverLife
from transfer.protocol.receiver_session import ReceiverSession
from transfer.protocol.receiver_window import ReceiverWindow, WindowRecord
from transfer.protocol.strays import Strays
from transfer.streams.stream_receiver import StreamReceiver

Planted = Callable[[], AbstractContextManager[Any]]


def acknowledge_before_storing() -> AbstractContextManager[Any]:
    """An Ack counts every block that came, also those beyond a gap."""
    right = ReceiverLife._ack

    def wrong(self: ReceiverLife) -> Ack:
        ack = right(self)
        return replace(ack, next_index=ack.next_index + len(self.window.stored))

    return patch.object(ReceiverLife, "_ack", wrong)


def forget_the_tag_check() -> AbstractContextManager[Any]:
    """Blocks are stored whatever their bytes."""
    right = ReceiverSession._refusal

    def wrong(self: ReceiverSession, message: Block, frames: Sequence[memoryview]) -> str | None:
        reason = right(self, message, frames)
        return None if reason == "bad_tag" else reason

    return patch.object(ReceiverSession, "_refusal", wrong)


def fence_late() -> AbstractContextManager[Any]:
    """A new ticket is issued and the old epoch goes on."""

    def wrong(self: StreamReceiver, stream_id: str, on_ticket: Callable[[Any], None]) -> None:
        stream = self._streams.by_id.get(stream_id)
        on_ticket(None if stream is None else stream.session.ticket.next_epoch())

    return patch.object(StreamReceiver, "_reissue", wrong)


def go_on_one_block_too_far() -> AbstractContextManager[Any]:
    """A sender that takes over is told to begin one block behind the first that is missing."""
    right = take_over.accept_of

    def wrong(facts: Any, offer: Any, first_index: int, *more: Any) -> Any:
        return right(facts, offer, first_index + bool(first_index), *more)

    return patch("transfer.protocol.receiver_session.accept_of", wrong)


def forget_last_words() -> AbstractContextManager[Any]:
    """A sender that missed the Close never hears it again."""
    return patch.object(Strays, "ended", lambda self, last_word, sender: None)


def deliver_again_after_a_restart() -> AbstractContextManager[Any]:
    """A restarted loop hands on the last block once more."""
    right = ReceiverWindow.restore.__func__  # type: ignore[attr-defined]

    def wrong(cls: type[ReceiverWindow], record: WindowRecord, delivered: int) -> ReceiverWindow:
        window: ReceiverWindow = right(cls, record, delivered)
        if window.delivered and window.next_index > window.delivered - 1:
            window.delivered -= 1
            window.held[window.delivered] = next(iter(window.held.values()), 0)
        return window

    return patch.object(ReceiverWindow, "restore", classmethod(wrong))


def lose_what_was_acknowledged() -> AbstractContextManager[Any]:
    """A restarted loop forgets blocks that were stored and not yet handed on."""
    right = ReceiverWindow.restore.__func__  # type: ignore[attr-defined]

    def wrong(cls: type[ReceiverWindow], record: WindowRecord, delivered: int) -> ReceiverWindow:
        return right(cls, record._replace(next_index=delivered, stored=frozenset()), delivered)  # type: ignore[no-any-return]

    return patch.object(ReceiverWindow, "restore", classmethod(wrong))


def write_revoked_blocks() -> AbstractContextManager[Any]:
    """Blocks that were withdrawn are free, and their old Blocks are still taken."""
    cut, refusal = ReceiverWindow.cut, ReceiverSession._refusal
    withdrawn: dict[ReceiverWindow, dict[int, int]] = {}

    def wrong_cut(self: ReceiverWindow, first_index: int) -> tuple[int, ...]:
        withdrawn[self] = {index: block_id for index, block_id in self.held.items() if index >= first_index}
        return cut(self, first_index)

    def wrong_refusal(self: ReceiverSession, message: Block, frames: Sequence[memoryview]) -> str | None:
        reason = refusal(self, message, frames)
        was_granted = withdrawn.get(self.window, {}).get(message.index) == message.block_id
        if reason == "not_granted" and was_granted:
            self.window.held.setdefault(message.index, message.block_id)
            return None
        return reason

    @contextmanager
    def planted() -> Iterator[None]:
        with patch.object(ReceiverWindow, "cut", wrong_cut), patch.object(ReceiverSession, "_refusal", wrong_refusal):
            yield

    return planted()


def take_any_content() -> AbstractContextManager[Any]:
    """A take-over goes on whatever its content key."""
    right = take_over.opened_by

    def wrong(facts: Any, window: Any, offer: Any, message: Any, now: float) -> Any:
        return right(replace(facts, content_key=message.content_key), window, offer, message, now)

    return patch("transfer.protocol.receiver_session.opened_by", wrong)


def hide_the_restart() -> AbstractContextManager[Any]:
    """The consumer is not told that another content begins."""
    right = take_over.opened_by

    def wrong(*arguments: Any) -> Any:
        event, facts, actions = right(*arguments)
        return event, facts, [action for action in actions if not isinstance(action, Restarted)]

    return patch("transfer.protocol.receiver_session.opened_by", wrong)


def ignore_the_deadline() -> AbstractContextManager[Any]:
    """A receiver goes on beyond its deadline."""
    right = ReceiverLife.tick

    def wrong(self: ReceiverLife, now: float) -> list[ReceiverAction]:
        self.facts = replace(self.facts, deadline=None)
        return right(self, now)

    return patch.object(ReceiverLife, "tick", wrong)


BUGS: tuple[Planted, ...] = (
    acknowledge_before_storing,
    forget_the_tag_check,
    fence_late,
    go_on_one_block_too_far,
    forget_last_words,
    deliver_again_after_a_restart,
    lose_what_was_acknowledged,
    write_revoked_blocks,
    take_any_content,
    hide_the_restart,
    ignore_the_deadline,
)
