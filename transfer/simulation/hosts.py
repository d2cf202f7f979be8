"""Hosts: the machines of a run, each with the real shells in it while it is up, and what can befall a machine."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import replace

from transfer.protocol.ticket import SECRET_BYTES, Ticket
from transfer.service.service import Service
from transfer.simulation.judge import Judge
from transfer.simulation.memory import WatchedBuffers, WatchedPool
from transfer.simulation.network import VirtualEndpoint, VirtualNetwork
from transfer.simulation.scenario import Scenario
from transfer.simulation.timeline import Process
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import StreamSender


class Host(ABC):
    """One machine: its program may crash and be started again, be stopped and woken, and its clock may leap."""

    def __init__(self, name: str, network: VirtualNetwork, judge: Judge, scenario: Scenario) -> None:
        self.name = name
        self.dice = random.Random(f"{scenario.seed}/{name}")  # in the place of the operating system's random bytes
        self.address = f"virtual://{name}"
        self.network = network
        self.judge = judge
        self.scenario = scenario
        self.config = scenario.config
        self.num_lives = 0
        self.num_stops = 0
        self.process: Process
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
        endpoint = VirtualEndpoint(
            self.network, self.process, self.address, self.config, is_encrypted=self.scenario.is_encrypted
        )
        self.service = Service(endpoint, self.config, clock=self.process.now)
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
        self.sender = StreamSender(self.service, self.config, token_bytes=self.dice.randbytes)

    def states(self) -> dict[str, str]:
        """See Host."""
        return {stream_id: stream.session.state.value for stream_id, stream in self.sender._streams.items()}

    def sends(self, stream_id: str) -> bool:
        """Whether some epoch of this stream is open here."""
        return stream_id in self.sender._streams


class ReceiverHost(Host):
    """Receives, into a pool under watch."""

    receiver: StreamReceiver

    def attach(self) -> None:
        """Put a StreamReceiver on the service, and watch its memory."""
        self.receiver = StreamReceiver(self.service, self.config, self.scenario.planes, next_ticket=self._next_ticket)
        self.watch = self.judge.watch(self.process)
        self.watch.touch = self.process.touch
        num_blocks, size = self.config.num_pool_blocks, self.config.block_size
        self.buffers = self.watch.buffers = WatchedBuffers(num_blocks, size, self.scenario.planes, self.watch)
        self.receiver._area._buffers = self.buffers
        self.receiver._area.pool = WatchedPool(num_blocks, size, self.watch, self.buffers.poison)

    def states(self) -> dict[str, str]:
        """See Host."""
        return {stream_id: stream.session.state.value for stream_id, stream in self.receiver._streams.by_id.items()}

    def _next_ticket(self, ticket: Ticket) -> Ticket:
        return replace(ticket, epoch=ticket.epoch + 1, secret=self.dice.randbytes(SECRET_BYTES))
