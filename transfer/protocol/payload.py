"""Payload: how the rows of one epoch travel, at both ends: what proves a block, and the way into the receiver's block.

What the two ends agreed on decides. Tagged (or bare) frames are the rows as they are and are copied once their tag
proved right; who sent them follows from the connection. Sealed frames prove themselves and are decrypted straight into
the granted block. Sealing is loaded when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from transfer.config import TransferConfig
from transfer.connection import Frame
from transfer.errors import ConfigError
from transfer.protocol.actions import SendBlock
from transfer.protocol.integrity import NO_TAG, block_tag, tag_seed
from transfer.protocol.messages import Block, Probe
from transfer.protocol.negotiate import SEALED, TAGGED, Terms
from transfer.protocol.stream_record import StreamFacts
from transfer.protocol.ticket import Ticket
from transfer.tensors import SEAL_BYTES, PlaneSpec

if TYPE_CHECKING:
    from transfer.protocol.sealing import SealBuffers

Targets = Callable[[int, int], Sequence[memoryview]]
"""(block id, number of rows) -> the memory of that many rows, one view per plane."""


def integrity_offered(*, is_encrypted: bool, config: TransferConfig) -> tuple[str, ...]:
    """What an end offers: sealed payloads where connections are encrypted, and only these where `config.seal` says so.

    ConfigError when sealing is called for and the package that does it is missing.
    """
    if not config.seal and not is_encrypted:
        return (TAGGED,)
    try:
        import transfer.protocol.sealing  # noqa: F401 (now, so that the first stream need not wait for it)
    except ImportError as error:
        raise ConfigError(f"payloads are sealed here, which needs the cryptography package: {error}") from error
    return (SEALED,) if config.seal else (SEALED, TAGGED)


class OutgoingPayload(Protocol):
    """The sender's end."""

    def block(self, block: SendBlock, rows: Sequence[memoryview]) -> tuple[Block, Sequence[Frame]]:
        """The message and frames that carry these rows, which stay as they are."""

    def probe(self, probe: Probe) -> Probe:
        """The probe as it travels."""


class IncomingPayload(Protocol):
    """The receiver's end. `is_placed`: what `check` found right lies in its block already."""

    is_placed: bool

    def fits(self, frames: Sequence[memoryview], num_rows: int) -> bool:
        """Whether the frames have the sizes of so many rows."""

    def check(self, block: Block, frames: Sequence[memoryview]) -> bool:
        """Whether a block that was granted and is not stored is what its sender sent."""

    def knows(self, probe: Probe) -> bool:
        """Whether a probe is its sender's."""


def outgoing_payload(ticket: Ticket, nonce: bytes, terms: Terms, buffers: Callable[[], SealBuffers]) -> OutgoingPayload:
    """What the sender's Open (with this nonce) and the receiver's Accept agreed on. `buffers` to seal into, if so."""
    if terms.integrity == SEALED:
        return _SealedOut(ticket, nonce, buffers())
    return _TaggedOut(ticket, terms)


def incoming_payload(facts: StreamFacts, targets: Targets) -> IncomingPayload:
    """What was agreed on at the receiver, for a stream that is open."""
    assert facts.terms is not None
    return SealedPayload(facts, targets) if facts.terms.integrity == SEALED else TaggedPayload(facts)


class _TaggedOut:
    def __init__(self, ticket: Ticket, terms: Terms) -> None:
        self._ticket = ticket
        self._seed = tag_seed(ticket) if terms.integrity == TAGGED else None

    def block(self, block: SendBlock, rows: Sequence[memoryview]) -> tuple[Block, Sequence[Frame]]:
        tag = NO_TAG
        if self._seed is not None:
            b, t = block, self._ticket
            tag = block_tag(
                self._seed, t.stream_id, t.epoch, b.index, b.block_id, b.first_row, b.num_rows, b.serial, rows
            )
        return _message(self._ticket, block, tag), rows

    def probe(self, probe: Probe) -> Probe:
        return probe


class _SealedOut:
    def __init__(self, ticket: Ticket, nonce: bytes, buffers: SealBuffers) -> None:
        from transfer.protocol.sealing import BlockSealer

        self._ticket = ticket
        self._sealer = BlockSealer(ticket, nonce, buffers)

    def block(self, block: SendBlock, rows: Sequence[memoryview]) -> tuple[Block, Sequence[Frame]]:
        message = _message(self._ticket, block, NO_TAG)
        return message, self._sealer.seal(message, rows)

    def probe(self, probe: Probe) -> Probe:
        tag = self._sealer.probe_tag(probe.nonce)
        return Probe(stream_id=probe.stream_id, epoch=probe.epoch, nonce=probe.nonce, tag=tag)


def _message(ticket: Ticket, block: SendBlock, tag: bytes) -> Block:
    return Block(
        stream_id=ticket.stream_id,
        epoch=ticket.epoch,
        index=block.index,
        block_id=block.block_id,
        first_row=block.first_row,
        num_rows=block.num_rows,
        serial=block.serial,
        tag=tag,
    )


class TaggedPayload:
    """Frames as they are, under the tag in their header or none."""

    is_placed = False

    def __init__(self, facts: StreamFacts) -> None:
        assert facts.terms is not None
        self._row_bytes = _row_bytes(facts.terms.planes)
        self._seed = tag_seed(facts.ticket) if facts.terms.integrity == TAGGED else None

    def fits(self, frames: Sequence[memoryview], num_rows: int) -> bool:
        """See IncomingPayload."""
        return [len(frame) for frame in frames] == [size * num_rows for size in self._row_bytes]

    def check(self, block: Block, frames: Sequence[memoryview]) -> bool:
        """See IncomingPayload."""
        if self._seed is None:
            return block.tag == NO_TAG
        b = block
        return b.tag == block_tag(
            self._seed, b.stream_id, b.epoch, b.index, b.block_id, b.first_row, b.num_rows, b.serial, frames
        )

    def knows(self, probe: Probe) -> bool:
        """See IncomingPayload."""
        return probe.tag == NO_TAG


class SealedPayload:
    """Frames that were sealed with the key of this epoch and sender."""

    is_placed = True

    def __init__(self, facts: StreamFacts, targets: Targets) -> None:
        from transfer.protocol.sealing import BlockUnsealer

        assert facts.terms is not None and facts.opened is not None
        self._row_bytes = _row_bytes(facts.terms.planes)
        self._targets = targets
        self._unsealer = BlockUnsealer(facts.ticket, facts.opened.nonce)

    def fits(self, frames: Sequence[memoryview], num_rows: int) -> bool:
        """See IncomingPayload."""
        return [len(frame) for frame in frames] == [size * num_rows + SEAL_BYTES for size in self._row_bytes]

    def check(self, block: Block, frames: Sequence[memoryview]) -> bool:
        """See IncomingPayload. Where it is wrong its memory holds nothing of use, and the block counts as empty."""
        targets = self._targets(block.block_id, block.num_rows)
        return block.tag == NO_TAG and self._unsealer.unseal(block, frames, targets)

    def knows(self, probe: Probe) -> bool:
        """See IncomingPayload."""
        return self._unsealer.knows_probe(probe.nonce, probe.tag)


def _row_bytes(planes: Sequence[PlaneSpec]) -> tuple[int, ...]:
    return tuple(plane.row_bytes for plane in planes)
