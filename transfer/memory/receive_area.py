"""ReceiveArea: one pool of blocks, the memory behind it, and the planner of who gets them.

A receiver has one for what comes over the wire; memory that senders write themselves would be an area of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from transfer.block_pool import BlockPool
from transfer.memory.buffers import PlaneBuffers, Tensor
from transfer.memory.segment_book import SegmentBook
from transfer.protocol.grant_planner import Demand, GrantPlanner, Plan
from transfer.protocol.receiver_session import ReceiverSession
from transfer.protocol.state import ReceiverState
from transfer.tensors import PlaneSpec


class ReceiveArea:
    """`num_blocks` blocks of `block_size` rows of `planes`, shared by streams."""

    def __init__(self, pool: BlockPool | SegmentBook, buffers: PlaneBuffers) -> None:
        self.pool = pool
        self._buffers = buffers
        self._planner = GrantPlanner()

    @classmethod
    def of_wire(cls, num_blocks: int, block_size: int, planes: Sequence[PlaneSpec], device: str = "cpu") -> ReceiveArea:
        """Memory of our own, for what comes over the wire."""
        return cls(BlockPool(num_blocks, block_size), PlaneBuffers(num_blocks, block_size, planes, device))

    def place(self, block_id: int, frames: Sequence[memoryview]) -> None:
        """Verified frames into a granted block."""
        self._buffers.place(block_id, frames)

    def targets(self, block_id: int, num_rows: int) -> list[memoryview]:
        """The memory of a granted block's rows, one writable view per plane."""
        return self._buffers.frames(block_id, num_rows)

    def rows(self, block_id: int, num_rows: int) -> dict[str, Tensor]:
        """Views of a block's rows; valid until the block is freed."""
        return self._buffers.rows(block_id, num_rows)

    def allocate(self, stream_id: str, count: int) -> tuple[int, ...]:
        """`count` blocks for a stream that the plan named."""
        return self.pool.allocate(count * self.pool.block_size, stream_id).block_ids

    def free(self, stream_id: str, block_ids: Sequence[int], *, fenced: bool) -> None:
        """Blocks come back; over the wire only this side writes them, so they may be used again at once."""
        self.pool.free_blocks(stream_id, block_ids)

    def retain(self, stream_id: str, held: Sequence[int], *, fenced: bool) -> None:
        """After a restart: a stream keeps these of its blocks, and whatever else it had comes back, as `free` says."""
        lost = [block_id for block_id in self.pool.held_by(stream_id) if block_id not in set(held)]
        if lost:
            self.free(stream_id, lost, fenced=fenced)

    def end(self, stream_id: str) -> None:
        """The stream is over; what it still holds comes back."""
        self._planner.remove(stream_id)
        self._take_back(stream_id)

    def _take_back(self, stream_id: str) -> None:
        held = self.pool.held_by(stream_id) if self.pool.in_use_by(stream_id) else ()
        if held:
            self.free(stream_id, held, fenced=True)

    def update(self, session: ReceiverSession, turn: int) -> None:
        """What a stream wants and can give may have changed."""
        self._planner.update(session.ticket.stream_id, demand_of(session, turn))

    def plan(self) -> Plan:
        """Who gets what is free, and who gives something back."""
        return self._planner.plan(self.pool.num_free)


def demand_of(session: ReceiverSession, turn: int) -> Demand:
    """What a stream wants and can give: its default once opened, the rest once admitted and while it moves."""
    facts, window = session.facts, session.window
    state, admitted, pending = facts.state, facts.is_admitted, window.pending
    ahead = window.num_granted - window.next_index
    wanted = urgent = 0
    if state is ReceiverState.OPENED:
        wanted = session.default_blocks
    elif state is ReceiverState.HELD and window.num_rounds == 0:
        wanted = min(1, session.num_blocks)  # a sender that took over needs a grant to announce
    elif state is ReceiverState.ADMITTED and pending is None:
        waits = ahead > 0 and (session.is_stalled or session.has_yielded)  # for rows, not for blocks
        if ahead <= session.credit // 2 and not waits:  # else it has enough to go on with: fewer and larger grants
            wanted = session.num_blocks - window.num_granted
            urgent = min(wanted, session.credit - ahead)
    return Demand(
        rank=(not admitted or session.has_yielded, turn),
        wanted=wanted,
        urgent=urgent,
        empty=not window.held and (facts.total_rows is None or window.num_granted < session.num_blocks),
        held=session.num_withdrawable,
        surplus=max(0, ahead - session.credit) if admitted else 0,
        announced=facts.total_rows is not None,
        admitted=admitted,
        stalled=session.is_stalled or state is ReceiverState.ORPHANED,
        returning=0 if pending is None else len(pending.withheld),
    )
