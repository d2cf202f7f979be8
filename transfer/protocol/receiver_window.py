"""ReceiverWindow: the blocks of one stream at its receiver: granted, stored, handed on, withdrawn. Pure; counts only.

Indexes run 0 .. delivered .. next_index .. num_granted. Below `delivered` rows were handed on and their blocks freed;
below `next_index` every block is verified and stored; below `num_granted` the sender may fill them.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from transfer.protocol.messages import Grant, Revoke


class Pending(NamedTuple):
    """A revocation without its answer, and the blocks that wait for it."""

    revoke: Revoke
    withheld: tuple[int, ...]


class GrantRecord(NamedTuple):
    """What changes with grants and revocations only: blocks by index (some freed since), rounds, what is open."""

    blocks: tuple[tuple[int, int], ...]
    num_granted: int
    num_rounds: int
    open_grants: tuple[Grant, ...]
    serial: int
    pending: Pending | None


class WindowRecord(NamedTuple):
    """Everything a window is, as values; how far its rows were handed on is known to who did it."""

    grants: GrantRecord
    next_index: int
    stored: frozenset[int]


class ReceiverWindow:
    """One epoch after another: a take-over starts the rounds anew."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}  # index -> block id, for every block granted and not freed
        self.num_granted = 0
        self.num_rounds = 0
        self.next_index = 0
        self.delivered = 0
        self.stored: set[int] = set()  # indexes at or above next_index whose block is verified
        self.serial = 0  # of the last revocation
        self.pending: Pending | None = None
        self.open_grants: deque[Grant] = deque()  # those not used up
        self._record: GrantRecord | None = None

    @classmethod
    def restore(cls, record: WindowRecord, delivered: int) -> ReceiverWindow:
        """The window of a record, of which blocks below `delivered` were handed on."""
        window, grants = cls(), record.grants
        window.delivered = delivered
        window.next_index = max(record.next_index, delivered)
        window.held = {index: block for index, block in grants.blocks if index >= window.delivered}
        window.stored = {index for index in record.stored if index >= window.next_index}
        window.num_granted, window.num_rounds = grants.num_granted, grants.num_rounds
        window.open_grants.extend(grants.open_grants)
        window.serial, window.pending = grants.serial, grants.pending
        return window

    def record(self) -> WindowRecord:
        """The values to restore from; cheap when nothing was granted since the last one."""
        grants = self._record
        if grants is None:
            blocks, opened = tuple(self.held.items()), tuple(self.open_grants)
            grants = GrantRecord(blocks, self.num_granted, self.num_rounds, opened, self.serial, self.pending)
            self._record = grants
        return WindowRecord(grants, self.next_index, frozenset(self.stored))

    def grant(self, grant: Grant) -> None:
        """The next blocks; the Grant is repeated until it is used up."""
        for block_id in grant.block_ids:
            self.held[self.num_granted] = block_id
            self.num_granted += 1
        self.num_rounds += 1
        self.open_grants.append(grant)
        self._record = None

    def store(self, index: int, count: int = 1) -> None:
        """`count` blocks from `index` on are verified and stored."""
        stored = self.stored
        if index == self.next_index and not stored:
            self.next_index += count
        else:
            stored.update(range(index, index + count))
            while self.next_index in stored:
                stored.remove(self.next_index)
                self.next_index += 1
        grants = self.open_grants
        while grants and grants[0].first_index + len(grants[0].block_ids) <= self.next_index:
            grants.popleft()

    def hand_on(self) -> tuple[int, list[int]]:
        """The first index that was not handed on, and the ids of the blocks stored from there on; now they are."""
        first, self.delivered = self.delivered, self.next_index
        return first, list(map(self.held.pop, range(first, self.next_index)))

    def cut(self, first_index: int) -> tuple[int, ...]:
        """Forget every block at and after `first_index`, stored or not; their ids."""
        taken = tuple(self.held.pop(i) for i in range(max(first_index, self.delivered), self.num_granted))
        self.num_granted = max(self.delivered, min(self.num_granted, first_index))
        self.next_index = min(self.next_index, self.num_granted)
        self.stored = {index for index in self.stored if index < first_index}
        self._record = None
        return taken

    def begin_epoch(self) -> tuple[int, ...]:
        """The old sender's grants are void; what is stored in a row stays. The ids of the rest."""
        self.stored.clear()
        withheld = () if self.pending is None else self.pending.withheld
        taken = self.cut(self.next_index) + withheld
        self.pending = None
        self.num_rounds = self.serial = 0
        self.open_grants.clear()
        return taken

    def restart(self) -> tuple[int, ...]:
        """Everything again from index 0, nothing handed on. The ids of what is held; between two epochs only."""
        self.delivered = 0
        taken = tuple(self.held.values())
        self.held.clear()
        self.num_granted = self.next_index = 0
        self._record = None
        return taken

    def revoke(self, revoke: Revoke, *, withhold: bool) -> tuple[int, ...]:
        """Withdraw blocks; the ids that may be used again now (all, or with `withhold` none before `revoked`)."""
        taken = self.cut(revoke.first_index)
        self.serial = revoke.serial
        before = () if self.pending is None else self.pending.withheld
        self.pending = Pending(revoke, before + taken if withhold else before)
        return () if withhold else taken

    def revoked(self, serial: int) -> tuple[int, ...] | None:
        """The sender heard a revocation: the ids that waited for it; None when it is not the one that is open."""
        pending = self.pending
        if pending is None or pending.revoke.serial != serial:
            return None
        self.pending = None
        self.open_grants.clear()  # the sender has what it may fill
        self._record = None
        return pending.withheld
