"""Story: what happened, event by event, each with its virtual time, its place and the stream it is about.

Kept only when somebody wants to read it: a run that nobody watches pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transfer.protocol.messages import Message
from transfer.simulation.books import StreamBook
from transfer.simulation.timeline import Process

_SHOWN_CHARS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that happened. `number`: the request it is about, or None."""

    time_s: float
    place: str
    number: int | None
    text: str

    def __str__(self) -> str:
        of = "" if self.number is None else f"stream {self.number}"
        return f"{self.time_s:12.4f}  {self.place:<14} {of:<10} {self.text}"


class Story:
    """Events in order. `is_told` False: nothing is kept."""

    def __init__(self, is_told: bool) -> None:
        self.is_told = is_told
        self.events: list[Event] = []

    def tell(self, time_s: float, place: object, number: int | None, text: str) -> None:
        """Add an event."""
        if self.is_told:
            self.events.append(Event(time_s=time_s, place=str(place), number=number, text=text))

    def message(self, time_s: float, process: Process, book: StreamBook | None, verb: str, message: Message) -> None:
        """Add the leaving or arriving of a message."""
        if self.is_told:
            self.tell(time_s, process, None if book is None else book.number, f"{verb} {describe(message)}")

    def lines(self, number: int | None = None) -> Iterator[str]:
        """The story of one stream (with what concerns all), or of all."""
        for event in self.events:
            if number is None or event.number in (None, number):
                yield str(event)


def describe(message: Message) -> str:
    """A message in one line: what tells it from others, long bytes cut short."""
    fields = (name for name in type(message).__dataclass_fields__ if name != "stream_id")
    return f"{type(message).__name__} " + " ".join(f"{name}={_short(getattr(message, name))}" for name in fields)


def _short(value: object) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    text = str(value)
    return text if len(text) <= 4 * _SHOWN_CHARS else text[: 4 * _SHOWN_CHARS] + "..."
