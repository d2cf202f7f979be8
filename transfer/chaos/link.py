"""One link through the chaos proxy: two sockets, and what its plan makes of the bytes between them.

Two tasks per direction, one that reads and one that writes; what waits between them is bounded, so a slow reader slows
its writer as it would without the proxy. Knows nothing of listening or threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from transfer.chaos.plan import Cut, Direction, FaultPlan, LinkPlan, Pace, Pass, Step, Swallow

READ_BYTES = 65536
MAX_WAITING = 64  # reads (or pieces of them) that may wait in each direction of a link: 4 MiB at most
CONNECT_TIMEOUT_S = 10.0
LINGER_S = 0.5  # how long a cut waits for its far end to read what had left before it
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends a reset

Address: TypeAlias = tuple[socket.AddressFamily, Any]
Watch: TypeAlias = Callable[[int, Direction, bytes], int | None]


class Severed(Exception):
    """The link of this task was cut."""


@dataclass(slots=True)
class Relay:
    """What all links of a proxy share. `gate`: bytes pass while it is set."""

    plan: FaultPlan
    upstream: Address
    watch: Watch | None
    gate: asyncio.Event
    counts: Counter[str]


class Link:
    """`near` is the accepted socket, `far` the one to the upstream."""

    def __init__(self, relay: Relay, near: socket.socket) -> None:
        self._relay = relay
        self._plan: LinkPlan = relay.plan.link()
        self._near = near
        self._far: socket.socket | None = None
        self._is_silent = False  # half open: whatever comes is swallowed and nobody is told
        self._pumps: list[asyncio.Task[None]] = []
        self._cut_target: socket.socket | None = None
        _prepare(near)

    async def run(self) -> None:
        """Relay until both ends are done, or the link is cut. OSError when the upstream cannot be reached."""
        loop = asyncio.get_running_loop()
        try:
            family, address = self._relay.upstream
            near, far = self._near, socket.socket(family, socket.SOCK_STREAM)
            self._far = far
            _prepare(far)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):  # not wait_for, which swallows a cancel in Python 3.11
                await loop.sock_connect(far, address)
            for direction, source, target in ((Direction.UP, near, far), (Direction.DOWN, far, near)):
                queue: asyncio.Queue[tuple[float, Step | None]] = asyncio.Queue(MAX_WAITING)
                self._pumps.append(asyncio.create_task(self._read(source, direction, queue)))
                self._pumps.append(asyncio.create_task(self._write(target, direction, queue)))
            with contextlib.suppress(OSError, Severed):
                await asyncio.gather(*self._pumps)
        finally:
            for pump in self._pumps:
                pump.cancel()
            try:
                await asyncio.gather(*self._pumps, return_exceptions=True)
            finally:  # cancelled a second time: a link that ends while the proxy is closed
                await self._close()

    def discard(self) -> None:
        """End a link that was never run."""
        self._near.close()

    def go_silent(self) -> None:
        """From now on nothing passes, and neither end is told."""
        self._plan.is_cut = True
        if not self._is_silent:
            self._is_silent = True
            self._relay.counts["half_open"] += 1

    async def _read(
        self, source: socket.socket, direction: Direction, queue: asyncio.Queue[tuple[float, Step | None]]
    ) -> None:
        """From the socket, through the plan, to the queue."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(source, READ_BYTES)
            except OSError:
                if self._is_silent:
                    return
                raise
            if not data:
                self._relay.counts[f"ends_{direction.value}"] += 1
                await queue.put((0.0, None))
                return
            now = time.monotonic()
            for step in self._steps(direction, data):
                if isinstance(step, Swallow):
                    self._relay.counts["bytes_swallowed"] += step.num_bytes
                else:
                    await queue.put((now + step.delay_s if isinstance(step, Pass) else now, step))

    def _steps(self, direction: Direction, data: bytes) -> list[Step]:
        watch = self._relay.watch
        stop = None if watch is None or self._plan.is_cut else watch(self._plan.number, direction, data)
        if stop is None:
            return self._plan.feed(direction, data)
        steps = self._plan.feed(direction, data[:stop])
        if not self._plan.is_cut:
            self._plan.is_cut = True
            self._relay.plan.fired["watch"] += 1
            steps.append(Cut("watch"))
        return [Swallow(len(data) - stop), *steps] if stop < len(data) else steps

    async def _write(
        self, target: socket.socket, direction: Direction, queue: asyncio.Queue[tuple[float, Step | None]]
    ) -> None:
        """From the queue to the other socket, at its time and pace."""
        throttled = self._relay.plan.faults.throttle_bytes_per_s
        pace = Pace(throttled) if throttled else None
        while True:
            due_s, step = await queue.get()
            if step is None:
                break
            if isinstance(step, Cut):
                self._sever(target)
            elif isinstance(step, Pass) and not self._is_silent:
                if (wait_s := due_s - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                await self._send(target, direction, step.data, pace)
        if not self._is_silent:
            target.shutdown(socket.SHUT_WR)  # an end that closed one way only still gets its answer

    async def _send(self, target: socket.socket, direction: Direction, data: bytes, pace: Pace | None) -> None:
        relay, loop = self._relay, asyncio.get_running_loop()
        size = len(data) if pace is None else pace.piece_bytes
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            if pace is not None and (wait_s := pace.wait_s(len(piece), time.monotonic())) > 0:
                relay.plan.fired["throttle"] += 1
                await asyncio.sleep(wait_s)
            await relay.gate.wait()
            if self._is_silent:
                return
            await loop.sock_sendall(target, piece)
            relay.counts[f"bytes_{direction.value}"] += len(piece)

    def _sever(self, target: socket.socket) -> None:
        if self._relay.plan.faults.half_open:
            self.go_silent()
            return
        self._relay.counts["cut"] += 1
        self._cut_target = target
        raise Severed

    async def _close(self) -> None:
        """Close both sockets. After an orderly cut its target gets all that left before: a reset could overtake it."""
        loop, target = asyncio.get_running_loop(), self._cut_target
        is_reset = self._relay.plan.faults.reset
        for sock in (self._near, self._far):
            if sock is None:
                continue
            if is_reset and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            if sock is not target or is_reset:
                sock.close()
        if target is not None and not is_reset:
            try:
                with contextlib.suppress(OSError, TimeoutError):
                    target.shutdown(socket.SHUT_WR)
                    async with asyncio.timeout(LINGER_S):
                        while await loop.sock_recv(target, READ_BYTES):
                            pass
            finally:
                target.close()


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
