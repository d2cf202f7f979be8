"""SenderGrants: the blocks a sender may fill, as Grants give and Revokes take them. Pure; checks every one of them.

Rounds come in order, each goes on where the one before it ended; what comes twice or too early is dropped by name.
A round that was lost is passed over where all its blocks are stored: by blocks that were on their way when the grant
before it was withdrawn. What a sender can be made to remember is bounded, also before it knows how many blocks its
stream has.
"""

from __future__ import annotations

from transfer.errors import AlignmentError, IncompatibleBlocks, RemoteProtocolError
from transfer.protocol.messages import Grant, Revoke

MAX_UNANNOUNCED_BLOCKS = 1 << 20
_STORED = -1  # in the place of a block that was never named to us, and is stored all the same


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

    def refusal(self, message: Grant | Revoke, *, num_stored: int = 0, num_blocks: int | None = None) -> str | None:
        """Why a message is not for now: "duplicate", "early" (something before it was lost), or None. Typed errors.

        `num_stored`: blocks below are acknowledged. `num_blocks`: of the whole stream, once announced.
        """
        if isinstance(message, Revoke):
            if message.serial <= self.serial:
                return "duplicate"
            if self.num_rounds == 0 or message.first_index > max(self.end, num_stored):
                return "early"
            if message.first_index < self._first_index or message.round < self.num_rounds:
                raise RemoteProtocolError(f"a revocation from index {message.first_index}, round {message.round}")
            return None
        if message.round < self.num_rounds:
            return "duplicate"
        first_index = self.end
        if message.round > self.num_rounds:
            if not self.end < message.first_index <= num_stored:
                return "early"
            first_index = message.first_index
        self._check(message)
        self._check_range(message, first_index, num_blocks)
        return None

    def grant(self, grant: Grant) -> None:
        """Take the next round, which `refusal` let through."""
        if self.num_rounds == 0:
            self.round0_tokens = grant.allocated_tokens
        self._pass_over(grant.first_index)
        self.num_rounds = grant.round + 1
        self._ids.extend(grant.block_ids)

    def revoke(self, revoke: Revoke) -> None:
        """Give back what a revocation withdraws, which `refusal` let through."""
        self._pass_over(revoke.first_index)
        self.serial = revoke.serial
        self.num_rounds = revoke.round
        del self._ids[revoke.first_index - self._first_index :]

    def _pass_over(self, first_index: int) -> None:
        self._ids.extend([_STORED] * (first_index - self.end))

    def _check_range(self, grant: Grant, first_index: int, num_blocks: int | None) -> None:
        if grant.first_index != first_index:
            raise RemoteProtocolError(
                f"a grant goes on at index {grant.first_index}, the one before ended at {first_index}"
            )
        end = first_index + len(grant.block_ids)
        limit = self._first_index + MAX_UNANNOUNCED_BLOCKS
        if num_blocks is not None and grant.round:  # the first came when nobody knew how many are needed
            limit = num_blocks
        if end > limit:
            raise RemoteProtocolError(f"blocks {first_index} to {end - 1} granted, there can be only {limit}")

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
        if grant.credit < 1:
            raise RemoteProtocolError("a grant with a credit of 0 blocks can never be used")
