"""Media of a request inside the engine: placeholder expansion, the input buffer's rows, and who may have how many.

Owns the rows of each admitted request until it ends (a preempted sequence recomputes from them) and the budget over all
of them. Knows nothing of streams; whoever receives rows calls `MediaRows.write`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from language_worker.errors import MediaFailed, MediaMismatch, MediaTooLarge

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaItem:
    """One announced media item: grid (temporal, height, width) in patches and the rows it will send.

    content_key: equal for equal rows, "" when the sender does not say.
    """

    grid: Grid
    rows: int
    content_key: str = ""

    @property
    def cache_key(self) -> bytes | None:
        """What the prefix cache names the item's positions by; None without a content key."""
        return f"{self.grid}:{self.content_key}".encode() if self.content_key else None

    def to_body(self) -> dict[str, Any]:
        """As it is announced."""
        body: dict[str, Any] = {"grid": list(self.grid), "rows": self.rows}
        return body | {"content_key": self.content_key} if self.content_key else body

    @classmethod
    def from_body(cls, body: object, index: int) -> "MediaItem":
        """From an announced map {"grid": [t, h, w], "rows": n, "content_key": hex}, the last optional; MediaMismatch
        when it is malformed."""
        try:
            grid = tuple(body["grid"])  # type: ignore[index]
            rows = body["rows"]  # type: ignore[index]
            key = body.get("content_key", "")  # type: ignore[attr-defined]
        except (TypeError, KeyError, AttributeError):
            raise MediaMismatch(f"media item {index} was announced without grid and rows") from None
        if len(grid) != 3 or any(type(value) is not int or value < 1 for value in (*grid, rows)):
            raise MediaMismatch(f"media item {index} was announced with grid {grid} and {rows!r} rows")
        if not isinstance(key, str):
            raise MediaMismatch(f"media item {index} was announced with the content key {key!r}; use a string")
        return cls(grid=grid, rows=rows, content_key=key)


class MediaRows:
    """Input buffer of one request: rows [planes, total, hidden] filled in order by one writer, read by the engine.

    `num_filled` moves only after the rows below it are in place, so the reader needs no lock.
    """

    __slots__ = ("num_filled", "rows")

    def __init__(
        self, total: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device, num_planes: int = 1
    ) -> None:
        self.rows = torch.empty((num_planes, total, hidden_size), dtype=dtype, device=device)
        self.num_filled = 0

    @property
    def is_full(self) -> bool:
        return self.num_filled == self.rows.shape[1]

    def write(self, first_row: int, *planes: torch.Tensor) -> None:
        """Copy rows [n, hidden] of each plane to first_row..; they must continue where the last ones ended
        (MediaFailed)."""
        num_planes, total, hidden_size = self.rows.shape
        num_rows = planes[0].shape[0]
        fits = len(planes) == num_planes and all(plane.shape == (num_rows, hidden_size) for plane in planes)
        if first_row != self.num_filled or first_row + num_rows > total or not fits:
            raise MediaFailed(
                f"embedding rows {[tuple(plane.shape) for plane in planes]} arrived at row {first_row}; "
                f"expected row {self.num_filled} of {num_planes} planes {(total, hidden_size)}"
            )
        for target, plane in zip(self.rows, planes, strict=True):
            target[first_row : first_row + num_rows].copy_(plane)
        self.num_filled = first_row + num_rows

    def clear(self) -> None:
        """The rows come anew, from the first; nobody may be writing."""
        self.num_filled = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpandedPrompt:
    """A prompt with every placeholder repeated as often as its item has rows; `starts`: first index of each item."""

    token_ids: tuple[int, ...]
    starts: tuple[int, ...]
    media_positions: tuple[int, ...]


def count_placeholders(token_ids: Sequence[int], media_token_id: int | None, num_media: int) -> None:
    """MediaMismatch unless the prompt holds exactly `num_media` placeholders."""
    found = 0 if media_token_id is None else token_ids.count(media_token_id)
    if found != num_media:
        raise MediaMismatch(
            f"the prompt holds {found} media placeholders and {num_media} media items came with it; "
            "they must be equal in number"
        )


def expand_prompt(token_ids: Sequence[int], media_token_id: int | None, items: Sequence[MediaItem]) -> ExpandedPrompt:
    """Repeat the i-th placeholder items[i].rows times; MediaMismatch when the counts differ."""
    count_placeholders(token_ids, media_token_id, len(items))
    expanded: list[int] = []
    starts: list[int] = []
    positions: list[int] = []
    for token_id in token_ids:
        if token_id != media_token_id:
            expanded.append(token_id)
            continue
        rows = items[len(starts)].rows
        starts.append(len(expanded))
        positions.extend(range(len(expanded), len(expanded) + rows))
        expanded.extend([token_id] * rows)
    return ExpandedPrompt(token_ids=tuple(expanded), starts=tuple(starts), media_positions=tuple(positions))


class InputBudget:
    """Rows that may be reserved at once, granted oldest first and whole. `capacity` in rows; of keys that came at one
    time the smallest is the oldest."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._reserved: dict[int, int] = {}
        self._queue: dict[int, tuple[float, int]] = {}  # when it came, and the rows it asks for

    @property
    def num_reserved(self) -> int:
        return sum(self._reserved.values())

    def request(self, key: int, rows: int, came_at: float = 0.0) -> None:
        """Ask for `rows`; came_at: seconds, moved by a priority. MediaTooLarge when they could never fit."""
        if rows > self.capacity:
            raise MediaTooLarge(
                f"the request's media take {rows} rows and the input buffer holds {self.capacity}; "
                "send fewer or smaller images, or raise transfer.input_buffer_tokens"
            )
        self._queue[key] = came_at, rows

    def grant(self) -> list[int]:
        """Keys that now hold their reservation, oldest first; the first that does not fit stops the round."""
        granted: list[int] = []
        free = self.capacity - self.num_reserved
        for key in sorted(self._queue, key=lambda key: (self._queue[key][0], key)):
            _, rows = self._queue[key]
            if rows > free:
                break
            free -= rows
            del self._queue[key]
            self._reserved[key] = rows
            granted.append(key)
        return granted

    def release(self, key: int) -> None:
        """Give back a reservation or leave the queue; unknown keys hold nothing."""
        self._reserved.pop(key, None)
        self._queue.pop(key, None)
