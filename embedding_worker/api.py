"""What crosses the border of this package: the `embed` call's body, its items and its result. Plain maps on the wire.

Knows no tensors, no threads and no sockets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from embedding_worker.errors import InvalidEmbedRequest
from transfer.errors import TicketRejected
from transfer.protocol.ticket import Ticket

MAX_KEY_CHARS = 128
MAX_DEADLINE_MS = 10**12  # 31 years; threads cannot wait for more than 292


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbedRequest:
    """A request to embed `num_items` media (the call's frames, in prompt order) and stream the rows to `receiver`.

    deadline_ms: time left to be done, in milliseconds. media_key: a digest of all the media; "" where there is none,
    and then no other worker can go on with the stream where this one stops.
    """

    ticket: Ticket
    receiver_address: str
    receiver_public_key: str | None
    num_items: int
    deadline_ms: int
    media_key: str = ""

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> EmbedRequest:
        """Strict inverse of `to_body`. Raises InvalidEmbedRequest."""
        names = ("ticket", "receiver", "num_items", "deadline_ms", "media_key")
        if set(body) != set(names):
            raise InvalidEmbedRequest(f"needs {', '.join(names)}, got {sorted(body)}")
        receiver = body["receiver"]
        if not isinstance(receiver, Mapping) or set(receiver) != {"address", "public_key"}:
            raise InvalidEmbedRequest("receiver is a map of address and public_key")
        address, public_key = receiver["address"], receiver["public_key"]
        if not isinstance(address, str) or not isinstance(public_key, str | None):
            raise InvalidEmbedRequest("receiver.address is a string, receiver.public_key a string or null")
        for name in ("num_items", "deadline_ms"):
            if type(body[name]) is not int or body[name] < 1:
                raise InvalidEmbedRequest(f"{name} must be a positive integer, got {body[name]!r}")
        if body["deadline_ms"] > MAX_DEADLINE_MS:
            raise InvalidEmbedRequest(f"deadline_ms must be at most {MAX_DEADLINE_MS}, got {body['deadline_ms']}")
        media_key = body["media_key"]
        if not isinstance(media_key, str) or len(media_key) > MAX_KEY_CHARS:
            raise InvalidEmbedRequest(f"media_key must be a string of at most {MAX_KEY_CHARS} characters")
        try:
            ticket = Ticket.from_body(body["ticket"])
        except TicketRejected as error:
            raise InvalidEmbedRequest(str(error)) from error
        return cls(
            ticket=ticket,
            receiver_address=address,
            receiver_public_key=public_key,
            num_items=body["num_items"],
            deadline_ms=body["deadline_ms"],
            media_key=media_key,
        )

    def to_body(self) -> dict[str, Any]:
        """Plain map for the call."""
        return {
            "ticket": self.ticket.to_body(),
            "receiver": {"address": self.receiver_address, "public_key": self.receiver_public_key},
            "num_items": self.num_items,
            "deadline_ms": self.deadline_ms,
            "media_key": self.media_key,
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbedItem:
    """One medium of the announcement: grid (t, h, w) in patches, its number of rows, and its content key."""

    grid: tuple[int, int, int]
    num_rows: int
    content_key: str

    def to_body(self) -> dict[str, Any]:
        """Plain map for the announcement."""
        return {"grid": list(self.grid), "rows": self.num_rows, "content_key": self.content_key}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSummary:
    """What encoding one request took. Milliseconds are this request's share of the work, not waiting."""

    preprocess_ms: float
    encode_ms: float
    num_rows: int
    num_cache_hits: int
