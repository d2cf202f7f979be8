"""SenderGrants: the blocks a sender may fill, as Grants give and Revokes take them. Pure; checks every one of them.

Rounds come in order, each goes on where the one before it ended; what comes twice or too early is dropped by name.
"""

from __future__ import annotations

from transfer.errors import AlignmentError, IncompatibleBlocks, RemoteProtocolError
from transfer.protocol.messages import Grant, Revoke


class SenderGrants:
    """Block ids by index, from `first_index` on."""

    def __init__(self, block_size: int, first_index: int) -> None:
        self.num_rounds = 0
        self.serial = 0  # of the last revocation
        self.round0_tokens = 0
        self._block_size = block_size
        self._first_index = first_index
        self._ids: list[int] = []

    @property
    def end(self) -> int:
        """Indexes below this are granted."""
        return self._first_index + len(self._ids)

    def block_id(self, index: int) -> int:
        """The receiver's block for `index`."""
        return self._ids[index - self._first_index]

    def block_ids(self, index: int, count: int) -> tuple[int, ...]:
        """The receiver's blocks for `index` and those after it."""
        first = index - self._first_index
        return tuple(self._ids[first : first + count])

    def refusal(self, message: Grant | Revoke) -> str | None:
        """Why a message is not for now: "duplicate", "early" (something before it was lost), or None. Typed errors."""
        if isinstance(message, Revoke):
            if message.serial <= self.serial:
                return "duplicate"
            if self.num_rounds == 0 or message.first_index > self.end:
                return "early"
            if message.first_index < self._first_index or message.round < self.num_rounds:
                raise RemoteProtocolError(f"a revocation from index {message.first_index}, round {message.round}")
            return None
        if message.round != self.num_rounds:
            return "duplicate" if message.round < self.num_rounds else "early"
        self._check(message)
        return None

    def grant(self, grant: Grant) -> None:
        """Take the next round, which `refusal` let through."""
        if self.num_rounds == 0:
            self.round0_tokens = grant.allocated_tokens
        self.num_rounds += 1
        self._ids.extend(grant.block_ids)

    def revoke(self, revoke: Revoke) -> None:
        """Give back what a revocation withdraws, which `refusal` let through."""
        self.serial = revoke.serial
        self.num_rounds = revoke.round
        del self._ids[revoke.first_index - self._first_index :]

    def _check(self, grant: Grant) -> None:
        if grant.block_size != self._block_size:
            raise IncompatibleBlocks(
                f"the receiver uses blocks of {grant.block_size} rows, this sender {self._block_size}: "
                "configure both alike"
            )
        if not grant.block_ids or grant.allocated_tokens != len(grant.block_ids) * self._block_size:
            raise AlignmentError(
                f"a grant of {len(grant.block_ids)} blocks of {self._block_size} rows says {grant.allocated_tokens} "
                f"tokens, not {len(grant.block_ids) * self._block_size}"
            )
        if grant.first_index != self.end:
            raise RemoteProtocolError(
                f"a grant goes on at index {grant.first_index}, the one before ended at {self.end}"
            )
        if grant.credit < 1:
            raise RemoteProtocolError("a grant with a credit of 0 blocks can never be used")
