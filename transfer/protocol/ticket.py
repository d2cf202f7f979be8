"""Ticket: the right to send one stream, once, under one epoch.

The controller issues the epoch-1 ticket and gives it to both ends; later epochs come from the receiver only. The
secret itself never travels between the two ends: each proves to the other that it has it, with an HMAC over what it
says in Open and Accept.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transfer.errors import TicketRejected
from transfer.protocol.messages import Accept, Open
from transfer.protocol.negotiate import Offer

SECRET_BYTES = 16
STREAM_ID_CHARS = 32
MAX_OWNER_CHARS = 256
_HEX = frozenset("0123456789abcdef")


def is_stream_id(value: object) -> bool:
    """True for 32 lower-case hexadecimal digits."""
    return isinstance(value, str) and len(value) == STREAM_ID_CHARS and _HEX.issuperset(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """One attempt at one stream. Raises TicketRejected for fields out of range. `repr` hides the secret."""

    stream_id: str
    epoch: int
    owner: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not is_stream_id(self.stream_id):
            raise TicketRejected("a ticket's stream_id is 32 lower-case hexadecimal digits")
        if type(self.epoch) is not int or not 1 <= self.epoch < 1 << 32:
            raise TicketRejected("a ticket's epoch is an int from 1 to 2**32 - 1")
        if not isinstance(self.owner, str) or len(self.owner) > MAX_OWNER_CHARS:
            raise TicketRejected(f"a ticket's owner is a string of at most {MAX_OWNER_CHARS} characters")
        if not isinstance(self.secret, bytes) or len(self.secret) != SECRET_BYTES:
            raise TicketRejected(f"a ticket's secret is {SECRET_BYTES} bytes")

    @classmethod
    def issue(cls, owner: str) -> Ticket:
        """A fresh stream with a fresh secret, epoch 1."""
        secret = secrets.token_bytes(SECRET_BYTES)
        return cls(stream_id=secrets.token_hex(STREAM_ID_CHARS // 2), epoch=1, owner=owner, secret=secret)

    def next_epoch(self) -> Ticket:
        """The ticket of the next attempt, with a new secret. For the receiver only."""
        return replace(self, epoch=self.epoch + 1, secret=secrets.token_bytes(SECRET_BYTES))

    def to_body(self) -> dict[str, object]:
        """Plain map for a message body (holds the secret: only for the two ends of the stream)."""
        return {"stream_id": self.stream_id, "epoch": self.epoch, "owner": self.owner, "secret": self.secret}

    @classmethod
    def from_body(cls, body: object) -> Ticket:
        """Strict inverse of to_body; TicketRejected for anything else."""
        if not isinstance(body, Mapping) or set(body) != {"stream_id", "epoch", "owner", "secret"}:
            raise TicketRejected("a ticket is a map of stream_id, epoch, owner and secret")
        return cls(stream_id=body["stream_id"], epoch=body["epoch"], owner=body["owner"], secret=body["secret"])


def proven_open(ticket: Ticket, nonce: bytes, offer: Offer, content_key: str, deadline_ms: int | None) -> Open:
    """The Open of a holder of the ticket; its proof is bound to everything it says."""
    message = Open(
        stream_id=ticket.stream_id,
        epoch=ticket.epoch,
        proof=b"",
        nonce=nonce,
        offer=offer,
        content_key=content_key,
        deadline_ms=deadline_ms,
    )
    return replace(message, proof=_prove(ticket, *_open_fields(message), deadline_ms))


def open_is_proven(ticket: Ticket, message: Open) -> bool:
    """Whether an Open comes from a holder of this ticket, of this epoch; compared in constant time."""
    ours = _prove(ticket, *_open_fields(message), message.deadline_ms)
    return message.epoch == ticket.epoch and hmac.compare_digest(ours, message.proof)


def proven_accept(ticket: Ticket, message: Accept, opened: Open) -> Accept:
    """`message` with its proof, which is bound to everything it says and to the Open that it answers."""
    return replace(message, proof=_prove(ticket, *_accept_fields(message), *_open_fields(opened)))


def accept_is_proven(ticket: Ticket, message: Accept, opened: Open) -> bool:
    """Whether an Accept of `opened` comes from a holder of this ticket; compared in constant time."""
    ours = _prove(ticket, *_accept_fields(message), *_open_fields(opened))
    return message.epoch == ticket.epoch and hmac.compare_digest(ours, message.proof)


def _open_fields(message: Open) -> tuple[object, ...]:
    return "open", message.nonce.hex(), _offer_text(message.offer), message.content_key


def _accept_fields(message: Accept) -> tuple[object, ...]:
    segment = sorted((message.segment or {}).items())
    return "accept", _offer_text(message.offer), message.first_index, segment, message.data_address


def _prove(ticket: Ticket, *fields: object) -> bytes:
    text = repr(("tandem", 2, ticket.stream_id, ticket.epoch, *fields))
    return hmac.new(ticket.secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()


def _offer_text(offer: Offer) -> str:
    shapes = [(p.name, p.dtype, p.row_shape) for p in offer.planes]
    ways = (offer.integrity, offer.payload)
    return repr((offer.versions, offer.block_size, shapes, *ways, offer.max_frame_bytes, offer.credit))
