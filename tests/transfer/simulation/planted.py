"""Planted bugs: one wrong line of the protocol each, put in while a `with` block lasts.

Every one is a mistake that somebody could make, and that the tests of a single stream on a good day would not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from transfer.memory import receive_area
from transfer.protocol import take_over
from transfer.protocol.actions import FreeBlocks, ReceiverAction, ReleaseRows, Restarted, SendBlock, SenderAction
from transfer.protocol.grant_planner import Demand
from transfer.protocol.messages import Ack, Announce, Block, Resume
from transfer.protocol.probes import Probes
from transfer.protocol.receiver_life import ReceiverLife
from transfer.protocol.receiver_session import ReceiverSession
from transfer.protocol.receiver_window import ReceiverWindow, WindowRecord
from transfer.protocol.sender_grants import SenderGrants
from transfer.protocol.sender_session import SenderSession
from transfer.protocol.state import ReceiverState, SenderState
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


def divide_the_allocation() -> AbstractContextManager[Any]:
    """The alignment of a grant is checked by floor division."""
    right = SenderGrants._check

    def wrong(self: SenderGrants, grant: Any) -> None:
        tokens = grant.allocated_tokens // self._block_size * self._block_size
        right(self, replace(grant, allocated_tokens=tokens))

    return patch.object(SenderGrants, "_check", wrong)


def fence_late() -> AbstractContextManager[Any]:
    """A new ticket is issued and the old epoch goes on."""

    def wrong(self: StreamReceiver, stream_id: str, on_ticket: Callable[[Any], None]) -> None:
        stream = self._streams.by_id.get(stream_id)
        on_ticket(None if stream is None else stream.session.ticket.next_epoch())

    return patch.object(StreamReceiver, "_reissue", wrong)


def keep_the_surplus() -> AbstractContextManager[Any]:
    """Blocks beyond the announced total are forgotten and not returned."""
    right = ReceiverSession.announce

    def wrong(self: ReceiverSession, message: Announce, now: float) -> list[ReceiverAction]:
        return [action for action in right(self, message, now) if not isinstance(action, FreeBlocks)]

    return patch.object(ReceiverSession, "announce", wrong)


def send_everything_again_per_probe() -> AbstractContextManager[Any]:
    """A probe repeats every block that is not acknowledged."""
    right = SenderSession._probe

    def wrong(self: SenderSession, now: float) -> list[SenderAction]:
        again = map(self._block, range(self.num_acked, self.num_sent))
        return [*right(self, now), *(again if self.state is SenderState.SENDING else ())]

    return patch.object(SenderSession, "_probe", wrong)


def believe_every_answer() -> AbstractContextManager[Any]:
    """An answer to any probe, however old, makes the sender send again."""

    @contextmanager
    def planted() -> Iterator[None]:
        with (
            patch.object(Probes, "answered", lambda self, nonce: 1 << 30),
            patch.object(Probes, "clear", lambda self: None),
        ):
            yield

    return planted()


def go_on_one_block_too_far() -> AbstractContextManager[Any]:
    """A sender that takes over is told to begin one block behind the first that is missing."""
    right = take_over.accept_of

    def wrong(facts: Any, offer: Any, first_index: int, *more: Any) -> Any:
        return right(facts, offer, first_index + bool(first_index), *more)

    return patch("transfer.protocol.receiver_session.accept_of", wrong)


def grant_the_rest_to_everybody() -> AbstractContextManager[Any]:
    """Streams get their remaining blocks before they are admitted."""
    right = receive_area.demand_of

    def wrong(session: ReceiverSession, turn: int) -> Demand:
        demand = right(session, turn)
        if session.state is ReceiverState.HELD:
            return demand._replace(wanted=session.num_blocks - session.window.num_granted)
        return demand

    return patch.object(receive_area, "demand_of", wrong)


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


def forget_rows_too_early() -> AbstractContextManager[Any]:
    """The sender forgets rows that are stored, though their blocks may still be withdrawn."""
    right = SenderSession._note_stored

    def wrong(self: SenderSession, next_index: int, kept_index: int, now: float) -> list[SenderAction]:
        return [*right(self, next_index, kept_index, now), ReleaseRows(self._row_after(next_index))]

    return patch.object(SenderSession, "_note_stored", wrong)


def use_a_serial_twice() -> AbstractContextManager[Any]:
    """A block that is sent again has the serial of the first time."""
    right = SenderSession._block

    def wrong(self: SenderSession, index: int) -> SendBlock:
        return replace(right(self, index), serial=index + 1)

    return patch.object(SenderSession, "_block", wrong)


def ignore_the_credit() -> AbstractContextManager[Any]:
    """A sender sends whatever is granted."""
    right = SenderSession._on_grant

    def wrong(self: SenderSession, grant: Any, now: float) -> list[SenderAction]:
        actions = right(self, grant, now)
        self._credit = 1 << 30
        return [*actions, *self._advance(now)]

    return patch.object(SenderSession, "_on_grant", wrong)


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


def never_ask_back() -> AbstractContextManager[Any]:
    """Streams that are not admitted keep everything they were granted."""
    return patch("transfer.protocol.grant_planner.GrantPlanner._withdraw", lambda self: {})


def keep_what_was_admitted() -> AbstractContextManager[Any]:
    """A stream that is admitted gives nothing back, however long its producer takes."""
    right = receive_area.demand_of

    def wrong(session: ReceiverSession, turn: int) -> Demand:
        demand = right(session, turn)
        return demand._replace(held=0) if demand.admitted else demand

    return patch.object(receive_area, "demand_of", wrong)


def keep_the_last_block() -> AbstractContextManager[Any]:
    """An admitted stream gives back all but one block, also when it stands still."""
    right = receive_area.demand_of

    def wrong(session: ReceiverSession, turn: int) -> Demand:
        demand = right(session, turn)
        return demand._replace(stalled=False) if demand.admitted else demand

    return patch.object(receive_area, "demand_of", wrong)


def ignore_resumes() -> AbstractContextManager[Any]:
    """Lost blocks are never sent again."""
    right = SenderSession._on_resume

    def wrong(self: SenderSession, resume: Resume, now: float) -> list[SenderAction]:
        return [action for action in right(self, resume, now) if not isinstance(action, SendBlock)]

    return patch.object(SenderSession, "_on_resume", wrong)


BUGS: tuple[Planted, ...] = (
    acknowledge_before_storing,
    forget_the_tag_check,
    divide_the_allocation,
    fence_late,
    keep_the_surplus,
    send_everything_again_per_probe,
    believe_every_answer,
    go_on_one_block_too_far,
    grant_the_rest_to_everybody,
    forget_last_words,
    deliver_again_after_a_restart,
    lose_what_was_acknowledged,
    write_revoked_blocks,
    forget_rows_too_early,
    use_a_serial_twice,
    ignore_the_credit,
    take_any_content,
    hide_the_restart,
    ignore_the_deadline,
    never_ask_back,
    keep_what_was_admitted,
    keep_the_last_block,
    ignore_resumes,
)
