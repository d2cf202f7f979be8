"""The Endpoint contract that every transport keeps.

An endpoint has one address and ONE I/O thread. Handlers, ticks and posted callbacks run on that thread and must not
block. Everything else may be called from any thread and never blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

from transfer.connection import Connection, Frame
from transfer.protocol.messages import Message

Handler: TypeAlias = Callable[[Connection, Message, Sequence[memoryview]], None]
Tick: TypeAlias = Callable[[float], None]


class Endpoint(Protocol):
    """A place where messages come in, and from where they go to peers."""

    @property
    def address(self) -> str:
        """What peers connect to: tcp://HOST:PORT, ipc://PATH or inproc://NAME."""

    @property
    def public_key(self) -> str | None:
        """CURVE public key (z85, 40 characters) peers need, or None where CURVE is off."""

    def start(
        self, handler: Handler, on_tick: Tick | None = None, on_restart: Callable[[], None] | None = None
    ) -> None:
        """Start the I/O thread. `on_tick(now)` (monotonic seconds) runs about every `tick_s`.

        Should the thread's loop die, it is started anew, and `on_restart()` runs first.
        """

    def listen_sealed(self, max_frame_bytes: int) -> str | None:
        """Listen for sealed Blocks and Probes beside the connections, which are encrypted: what senders `connect` to.

        None where connections are not encrypted: Blocks go over them as they are.
        """

    def connect(self, address: str, public_key: str | None = None) -> Connection:
        """The connection to `address`, cached, made lazily. ConfigError for an address this endpoint cannot reach."""

    def send(self, connection: Connection, message: Message, frames: Sequence[Frame] = ()) -> None:
        """Queue a message; frames are sent from where they lie.

        Raises Overloaded, PeerLost, MessageTooLarge, EndpointClosed.
        """

    def post(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the I/O thread, in order. Raises EndpointClosed."""

    def allow(self, public_keys: Iterable[str]) -> None:
        """Let peers with these CURVE keys in, and no others; who is in stays. Nothing to do where CURVE is off."""

    def disconnect(self, connection: Connection) -> None:
        """Forget a peer and whatever waits for it."""

    def close(self) -> None:
        """Run what was posted, stop the thread, free everything. Safe to repeat."""

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
