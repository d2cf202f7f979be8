"""Bugs of a sender. See `tests.transfer.simulation.planted`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from transfer.protocol.actions import ReleaseRows, SendBlock, SenderAction
from transfer.protocol.messages import Resume
from transfer.protocol.probes import Probes
from transfer.protocol.sender_grants import SenderGrants
from transfer.protocol.sender_session import SenderSession
from transfer.protocol.state import SenderState

Planted = Callable[[], AbstractContextManager[Any]]


def divide_the_allocation() -> AbstractContextManager[Any]:
    """The alignment of a grant is checked by floor division."""
    right = SenderGrants._check

    def wrong(self: SenderGrants, grant: Any) -> None:
        tokens = grant.allocated_tokens // self._block_size * self._block_size
        right(self, replace(grant, allocated_tokens=tokens))

    return patch.object(SenderGrants, "_check", wrong)


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


def ignore_resumes() -> AbstractContextManager[Any]:
    """Lost blocks are never sent again."""
    right = SenderSession._on_resume

    def wrong(self: SenderSession, resume: Resume, now: float) -> list[SenderAction]:
        return [action for action in right(self, resume, now) if not isinstance(action, SendBlock)]

    return patch.object(SenderSession, "_on_resume", wrong)


BUGS: tuple[Planted, ...] = (
    divide_the_allocation,
    send_everything_again_per_probe,
    believe_every_answer,
    forget_rows_too_early,
    use_a_serial_twice,
    ignore_the_credit,
    ignore_resumes,
)
