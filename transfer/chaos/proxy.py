"""ChaosProxy: a real TCP (or Unix socket) relay that does to its links what a fault plan says.

It relays any protocol and understands none. `chaos_plan` decides what becomes of which byte, `chaos_link` moves them;
here are the listener and the proxy's thread, with one asyncio loop. For tests and drills: put it between two workers,
or before the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from transfer.chaos.link import Address, Link, Relay, Watch
from transfer.chaos.plan import Direction, FaultPlan, Faults
from transfer.endpoints.addresses import prepare_ipc
from transfer.errors import ConfigError, LocalProtocolError

__all__ = ["ChaosProxy", "Direction", "Faults", "Watch"]

logger = logging.getLogger(__name__)

MAX_LINKS = 1024
ACCEPT_PAUSE_S = 0.05  # without a descriptor for a link
COUNTS = (
    "links", "links_open", "links_failed", "bytes_up", "bytes_down", "ends_up", "ends_down", "bytes_swallowed",
    "cut", "half_open",
)  # fmt: skip


class ChaosProxy:
    """Relays `listen` to `upstream`; both are HOST:PORT, tcp://HOST:PORT or ipc:///PATH.

    `watch(link, direction, data)`, if given, sees all bytes as they come, on the proxy's thread; where it returns a
    number, the link is cut once so many of these bytes have passed. ConfigError for an address that cannot be used.
    """

    def __init__(
        self, listen: str, upstream: str, faults: Faults | None = None, *, seed: int = 0, watch: Watch | None = None
    ) -> None:
        self._plan = FaultPlan(faults or Faults(), seed)
        self._upstream = _resolve(upstream)
        self._watch = watch
        self._listener, self._address = _listen(listen)
        self._counts: Counter[str] = Counter()
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._relay: Relay | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()

    # -- any thread -----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where it listens: tcp://HOST:PORT (the real port) or ipc:///PATH."""
        return self._address

    def start(self) -> None:
        """Start the proxy's thread. LocalProtocolError when it was started before."""
        if self._thread is not None:
            raise LocalProtocolError(f"the proxy at {self._address} was started before: make a new one")
        name = f"chaos {self._address}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name=name, daemon=True)
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        """Cut every link, stop listening, end the thread. Safe to repeat."""
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(stop.set)
        if self._thread is not None:
            self._thread.join()
        was_open = self._listener.fileno() >= 0
        self._listener.close()
        if was_open and self._address.startswith("ipc://"):
            with contextlib.suppress(OSError):
                os.unlink(self._address.removeprefix("ipc://"))

    def __enter__(self) -> ChaosProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> int:
        """Cut every link now; how many there were. New ones are accepted as before."""
        return self._ask(self._cut_all())

    def pause(self) -> None:
        """Let nothing pass in either direction, and lose nothing: links stay up."""
        self._ask(self._open_gate(False))

    def resume(self) -> None:
        """Let bytes pass again."""
        self._ask(self._open_gate(True))

    def counts(self) -> dict[str, int]:
        """Links, bytes and ends that the peers made themselves, and each fault by how often it fired."""
        fired = dict(self._plan.fired.items())
        names = sorted({*fired, *self._plan.faults.asked_for()})
        return {name: self._counts[name] for name in COUNTS} | {name: fired.get(name, 0) for name in names}

    def never_fired(self) -> tuple[str, ...]:
        """Faults that were asked for and did not happen: a run that leaves some here shows nothing of them."""
        return tuple(name for name in self._plan.faults.asked_for() if not self._plan.fired[name])

    def _ask(self, question: Coroutine[Any, Any, int]) -> int:
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            question.close()
            raise LocalProtocolError(f"the proxy at {self._address} does not run: start() it, and before close()")
        return asyncio.run_coroutine_threadsafe(question, self._loop).result()

    # -- the proxy's thread ---------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._relay = Relay(self._plan, self._upstream, self._watch, asyncio.Event(), self._counts)
        self._relay.gate.set()
        self._await_links(self._relay)
        self._ready.set()
        await self._stop.wait()
        self._loop.remove_reader(self._listener)
        tasks = list(self._links.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in self._links:  # accepted, and cancelled before it could begin
            link.discard()

    def _await_links(self, relay: Relay) -> None:
        """Not a task around sock_accept: one that is cancelled may lose the socket it was just given."""
        assert self._loop is not None and self._stop is not None
        if not self._stop.is_set():
            self._loop.add_reader(self._listener, self._accept, relay, self._loop)

    def _accept(self, relay: Relay, loop: asyncio.AbstractEventLoop) -> None:
        try:
            near, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, or the peer went before we looked
            logger.warning("cannot accept on %s: %s", self._address, error)
            loop.remove_reader(self._listener)
            loop.call_later(ACCEPT_PAUSE_S, self._await_links, relay)
            return
        if len(self._links) >= MAX_LINKS:
            self._counts["links_failed"] += 1
            near.close()
            return
        link = Link(relay, near)
        self._links[link] = loop.create_task(self._run(link))

    async def _run(self, link: Link) -> None:
        self._counts["links"] += 1
        self._counts["links_open"] += 1
        try:
            await link.run()
        except (OSError, TimeoutError) as error:
            self._counts["links_failed"] += 1
            logger.warning("a link of %s did not come up: %s", self._address, error)
        finally:
            self._counts["links_open"] -= 1
            del self._links[link]

    async def _cut_all(self) -> int:
        links = dict(self._links)
        for link, task in links.items():
            if self._plan.faults.half_open:
                link.go_silent()
            else:
                self._counts["cut"] += 1
                task.cancel()
        if not self._plan.faults.half_open:
            await asyncio.gather(*links.values(), return_exceptions=True)
        return len(links)

    async def _open_gate(self, is_open: bool) -> int:
        assert self._relay is not None
        if is_open:
            self._relay.gate.set()
        else:
            self._relay.gate.clear()
        return 0


def _split(address: str) -> tuple[str, int]:
    host, separator, port = address.removeprefix("tcp://").rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is no address: use HOST:PORT or ipc:///PATH")
    return host.strip("[]"), int(port)


def _resolve(upstream: str) -> Address:
    if upstream.startswith("ipc://"):
        return socket.AF_UNIX, upstream.removeprefix("ipc://")
    host, port = _split(upstream)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"cannot find the upstream {upstream}: {error.strerror}") from error
    return family, address


def _listen(address: str) -> tuple[socket.socket, str]:
    try:
        if address.startswith("ipc://"):
            prepare_ipc(address)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(address.removeprefix("ipc://"))
            listener.listen()
            name = address
        else:
            host, port = _split(address)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family)
            name = f"tcp://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener, name
