"""Hosts: the machines of a run, each with the real shells in it while it is up, and what can befall a machine."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from transfer.memory.segment_guest import SegmentGuest
from transfer.memory.segment_host import SegmentHost
from transfer.memory.segments import SegmentLayout
from transfer.protocol.ticket import SECRET_BYTES, Ticket
from transfer.service.service import Service
from transfer.simulation.endpoint import VirtualEndpoint
from transfer.simulation.judge import Judge
from transfer.simulation.memory import WatchedBuffers, WatchedPool
from transfer.simulation.network import VirtualNetwork
from transfer.simulation.passing import VirtualFetched, VirtualPassing
from transfer.simulation.scenario import Scenario
from transfer.simulation.segments import WatchedArea
from transfer.simulation.slot_rules import SlotRules
from transfer.simulation.timeline import Process
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import StreamSender


class Host(ABC):
    """One machine: its program may crash and be started again, be stopped and woken, and its clock may leap."""

    def __init__(
        self,
        name: str,
        network: VirtualNetwork,
        passing: VirtualPassing,
        judge: Judge,
        rules: SlotRules,
        scenario: Scenario,
    ) -> None:
        self.name = name
        self.passing = passing
        self.rules = rules
        self.dice = random.Random(f"{scenario.seed}/{name}")  # in the place of the operating system's random bytes
        self.address = f"virtual://{name}"
        self.network = network
        self.judge = judge
        self.scenario = scenario
        self.config = scenario.config
        self.num_lives = 0
        self.num_stops = 0
        self.process: Process
        self.endpoint: VirtualEndpoint
        self.service: Service
        self.boot()

    @property
    def is_up(self) -> bool:
        """Whether the program runs (or is merely stopped)."""
        return self.process.is_alive

    def boot(self) -> None:
        """Start the program."""
        self.num_lives += 1
        self.process = Process(self.name, self.num_lives, self.network.timeline, self.judge)
        self.endpoint = VirtualEndpoint(
            self.network, self.process, self.address, self.config, is_encrypted=self.scenario.is_encrypted
        )
        self.service = Service(self.endpoint, self.config, clock=self.process.now)
        self.attach()
        self.service.start()

    @abstractmethod
    def attach(self) -> None:
        """Put the host's side on its service."""

    @abstractmethod
    def states(self) -> dict[str, str]:
        """The state of every open stream, by its id."""

    def crash(self) -> None:
        """As SIGKILL: no farewell, and nothing is left."""
        self.num_stops = 0
        self.process.kill()
        self.passing.died(self.process)
        self.network.endpoints.pop(self.address, None)

    def stop(self) -> None:
        """As SIGSTOP."""
        self.num_stops += 1
        self.process.stop()

    def wake(self, process: Process) -> None:
        """As SIGCONT for that life of the program, once every stop is over."""
        if process is not self.process or not self.is_up:
            return
        self.num_stops -= 1
        if not self.num_stops:
            self.process.wake()


class SenderHost(Host):
    """Embeds, and sends."""

    sender: StreamSender

    def attach(self) -> None:
        """Put a StreamSender on the service."""
        self.guest = SegmentGuest(
            self.service, is_on=bool(self.scenario.local_senders), fetch=self._fetch, run=self._run_job
        )
        self.sender = StreamSender(self.service, self.config, token_bytes=self.dice.randbytes, segments=self.guest)

    def states(self) -> dict[str, str]:
        """See Host."""
        return {stream_id: stream.session.state.value for stream_id, stream in self.sender._streams.items()}

    def sends(self, stream_id: str) -> bool:
        """Whether some epoch of this stream is open here."""
        return stream_id in self.sender._streams

    def _fetch(self, path: str, ticket: Ticket, generation: int) -> VirtualFetched:
        process, watch = self.process, self.judge.segments[generation]
        return self.passing.fetch(process, path, ticket, generation, on_seal=partial(self.rules.sealed, process, watch))

    def _run_job(self, job: Callable[[], None]) -> None:
        self.process.after(self.dice.choice((0.0001, 0.003, 0.2)), job)


class ReceiverHost(Host):
    """Receives, into a pool under watch."""

    receiver: StreamReceiver

    def attach(self) -> None:
        """Put a StreamReceiver on the service, and watch its memory."""
        self.receiver = StreamReceiver(
            self.service, self.config, self.scenario.planes, next_ticket=self._next_ticket, segments=self._segments()
        )
        self.watch = self.judge.watch(self.process)
        self.watch.touch = self.process.touch
        num_blocks, size = self.config.num_pool_blocks, self.config.block_size
        self.buffers = self.watch.buffers = WatchedBuffers(num_blocks, size, self.scenario.planes, self.watch)
        self.receiver._area._buffers = self.buffers
        self.receiver._area.pool = WatchedPool(num_blocks, size, self.watch, self.buffers.poison)

    def states(self) -> dict[str, str]:
        """See Host."""
        return {stream_id: stream.session.state.value for stream_id, stream in self.receiver._streams.by_id.items()}

    def _segments(self) -> SegmentHost | None:
        if not self.scenario.local_senders:
            return None
        return SegmentHost(
            self.service,
            self.config,
            self.scenario.planes,
            folder=Path("/virtual"),
            open_server=lambda folder: self.passing.serve(self.process),
            make_area=self._make_area,
        )

    def _make_area(self, layout: SegmentLayout) -> WatchedArea:
        segment = self.passing.make(self.name, layout, self.dice.randrange(1, 1 << 63))
        watch = self.judge.watch_segment(self.process, segment)
        return WatchedArea(
            segment,
            has_checksums=self.config.shm_checksum,
            watch=watch,
            on_filled=partial(self.rules.filled, watch),
        )

    def _next_ticket(self, ticket: Ticket) -> Ticket:
        return replace(ticket, epoch=ticket.epoch + 1, secret=self.dice.randbytes(SECRET_BYTES))
