"""Ticket: the right to send one stream, once, under one epoch.

The controller issues the epoch-1 ticket and gives it to both ends; later epochs come from the receiver only. The
secret itself never travels between the two ends: the sender proves that it has it with an HMAC over what it opens.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transfer.errors import TicketRejected
from transfer.tensors import PlaneSpec

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


def prove(ticket: Ticket, block_size: int, planes: Sequence[PlaneSpec], content_key: str) -> bytes:
    """32 bytes that only a holder of the ticket can make, bound to everything an Open says."""
    shapes = ";".join(f"{p.name!r}:{p.dtype}:{p.row_shape!r}" for p in planes)
    text = f"tandem open 1|{ticket.stream_id}|{ticket.epoch}|{block_size}|{shapes}|{content_key!r}"
    return hmac.new(ticket.secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()


def verify(ticket: Ticket, proof: bytes, block_size: int, planes: Sequence[PlaneSpec], content_key: str) -> bool:
    """Whether `proof` was made with this ticket for exactly these values, compared in constant time."""
    return hmac.compare_digest(prove(ticket, block_size, planes, content_key), proof)
