"""Bugs of who gets which blocks when. See `tests.transfer.simulation.planted`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from transfer.memory import receive_area
from transfer.protocol.actions import FreeBlocks, ReceiverAction
from transfer.protocol.grant_planner import Demand
from transfer.protocol.messages import Announce
from transfer.protocol.receiver_session import ReceiverSession
from transfer.protocol.state import ReceiverState

Planted = Callable[[], AbstractContextManager[Any]]


def keep_the_surplus() -> AbstractContextManager[Any]:
    """Blocks beyond the announced total are forgotten and not returned."""
    right = ReceiverSession.announce

    def wrong(self: ReceiverSession, message: Announce, now: float) -> list[ReceiverAction]:
        return [action for action in right(self, message, now) if not isinstance(action, FreeBlocks)]

    return patch.object(ReceiverSession, "announce", wrong)


def grant_the_rest_to_everybody() -> AbstractContextManager[Any]:
    """Streams get their remaining blocks before they are admitted."""
    right = receive_area.demand_of

    def wrong(session: ReceiverSession, turn: int) -> Demand:
        demand = right(session, turn)
        if session.state is ReceiverState.HELD:
            return demand._replace(wanted=session.num_blocks - session.window.num_granted)
        return demand

    return patch.object(receive_area, "demand_of", wrong)


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


def serve_the_last_first() -> AbstractContextManager[Any]:
    """Of those that wait, who came last gets the next block: also who just gave one back.

    Not in `BUGS`: it takes two streams that stand still and a third that does not, which a seed seldom has.
    """
    right = receive_area.demand_of

    def wrong(session: ReceiverSession, turn: int) -> Demand:
        demand = right(session, turn)
        return demand._replace(rank=(demand.rank[0], -turn))

    return patch.object(receive_area, "demand_of", wrong)


BUGS: tuple[Planted, ...] = (
    keep_the_surplus,
    grant_the_rest_to_everybody,
    never_ask_back,
    keep_what_was_admitted,
    keep_the_last_block,
)
