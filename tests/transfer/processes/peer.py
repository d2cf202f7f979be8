"""One end of streams in a process of its own: a Service with a StreamReceiver and a StreamSender over one address.

Commands come as JSON lines {"do": NAME, ...} over its control socket and are answered by one line each; only the public
API is used (and what `cut_lifelines` cuts). The parent's half is `harness.Peer`. End of input closes the service and
ends the process.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tests.transfer.clocks import HandClock
from tests.transfer.processes.content import PLANES, Digest, make_rows
from transfer.chaos.proxy import ChaosProxy, Faults
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import TransferError, error_code
from transfer.protocol.actions import StreamStats
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import OutgoingStream, StreamSender

WRITE_ROWS = 100  # the producer's batch
WAIT_S = 60.0


class Consumer:
    """Reads one stream into a digest. What the fate names happens once so many rows have come."""

    def __init__(self, receiver: StreamReceiver, stream_id: str, fate: Mapping[str, Any]) -> None:
        self._receiver, self._stream_id, self._fate = receiver, stream_id, fate
        self.digest = Digest()
        self.total_rows: int | None = None
        self.num_restarts = 0
        self.wrong: str | None = None
        self.end: str | None = None
        self.resent = 0

    def on_announce(self, total_rows: int, items: Sequence[object]) -> None:
        if self.end == "closed":
            return
        self._note(self.total_rows is not None or self.end is not None, "announced twice or after the end")
        self.total_rows = total_rows
        if self._fate.get("admit", True):
            self._receiver.admit(self._stream_id)
        self._act(0)

    def on_rows(self, first_row: int, planes: Mapping[str, torch.Tensor]) -> None:
        if self.end == "closed":
            return  # from inside on_rows: what was decided before comes still
        self._note(first_row != self.digest.num_rows, f"row {first_row} came after {self.digest.num_rows} rows")
        self._note(self.end is not None, "rows came after the end")
        self.digest.add(planes)
        self._act(self.digest.num_rows)

    def on_restart(self) -> None:
        self._note(self.end is not None, "restarted after the end")
        self.digest, self.total_rows = Digest(), None
        self.num_restarts += 1

    def on_complete(self, stats: StreamStats) -> None:
        if self.end == "closed":
            return
        self._note(self.end is not None, "ended twice")
        self.end, self.resent = "complete", stats.resent_blocks

    def on_failed(self, error: TransferError) -> None:
        if self.end == "closed":
            return
        self._note(self.end is not None, "ended twice")
        self.end = error_code(error)

    def _act(self, num_rows: int) -> None:
        if num_rows >= self._fate.get("crash_at", 1 << 60):
            raise RuntimeError("the consumer crashes, as its fate says")
        if num_rows >= self._fate.get("close_at", 1 << 60):
            self.close()

    def close(self) -> None:
        """No longer wanted; nothing happens when it is over."""
        if self.end is None:
            self.end = "closed"
            self._receiver.close(self._stream_id)

    def _note(self, is_wrong: bool, what: str) -> None:
        if is_wrong and self.wrong is None:
            self.wrong = what

    def report(self) -> dict[str, Any]:
        return {
            "rows": self.digest.num_rows,
            "total_rows": self.total_rows,
            "digest": self.digest.hex(),
            "end": self.end,
            "wrong": self.wrong,
            "restarts": self.num_restarts,
            "resent": self.resent,
        }


class Producer:
    """Writes one stream, as far as it is told."""

    def __init__(self, stream: OutgoingStream, seed: int) -> None:
        self.stream, self.seed = stream, seed
        self.num_made = 0  # rows computed here, not merely asked for
        self.end: str | None = None
        self.stats: StreamStats | None = None
        stream.on_done(self._on_done)

    def write(self, first_row: int, until: int) -> None:
        for row in range(first_row, until, WRITE_ROWS):
            count = min(WRITE_ROWS, until - row)
            self.num_made += count
            self.stream.write(row, make_rows(self.seed, row, count))

    def _on_done(self, stream: OutgoingStream) -> None:
        try:
            self.stats = stream.result(0)
            self.end = "complete"
        except TransferError as error:
            self.end = error_code(error)

    def report(self) -> dict[str, Any]:
        resent, blocks = (self.stats.resent_blocks, self.stats.blocks) if self.stats else (0, 0)
        return {"made": self.num_made, "end": self.end, "resent": resent, "blocks": blocks}


class Host:
    """What the commands act on."""

    def __init__(self) -> None:
        self._consumers: dict[str, Consumer] = {}
        self._producers: dict[str, Producer] = {}

    def open(self, address: str, config: dict[str, Any], curve: bool | None = None) -> Any:
        settings = TransferConfig(**{"shared_memory": False, **config})  # faults strike the link, so payload takes it
        self.clock = HandClock(runs=True)
        self.service = Service(open_endpoint(address, settings, curve=curve), settings, clock=self.clock)
        self.receiver = StreamReceiver(self.service, settings, PLANES)
        self.sender = StreamSender(self.service, settings)
        self.service.start()
        return {"address": self.service.endpoint.address, "public_key": self.service.endpoint.public_key}

    def allow(self, public_keys: list[str]) -> Any:
        self.service.endpoint.allow(public_keys)
        return {}

    def expect(self, streams: list[dict[str, Any]]) -> Any:
        """[{"ticket", "fate"}, ...]: open each at the receiver."""
        for values in streams:
            ticket = ticket_of(values["ticket"])
            consumer = Consumer(self.receiver, ticket.stream_id, values.get("fate", {}))
            self._consumers[ticket.stream_id] = consumer
            self.receiver.open(ticket, consumer, **values.get("options", {}))
        return {}

    def send(self, streams: list[dict[str, Any]]) -> Any:
        """[{"ticket", "address", "seed", "total_rows", "write", "abort"}, ...]: open, announce, write so many rows."""
        for values in streams:
            ticket, total_rows = ticket_of(values["ticket"]), values["total_rows"]
            stream = self.sender.open(
                ticket,
                values["address"],
                values.get("public_key"),
                PLANES,
                values.get("content_key", ""),
                **values.get("options", {}),
            )
            producer = self._producers[ticket.stream_id] = Producer(stream, values["seed"])
            if values.get("announce", True):
                stream.announce(total_rows)
            producer.write(0, values.get("write", total_rows))
            if "abort" in values:
                stream.abort("Cancelled", values["abort"])
        return {}

    def take_over(self, stream: dict[str, Any]) -> Any:
        """As `send`, of a sender that computes nothing before it knows where to go on; its first row."""
        self.send([stream | {"write": 0}])
        producer = self._producers[stream["ticket"]["stream_id"]]
        first_row = producer.stream.wait_accepted(WAIT_S)
        producer.write(first_row, stream["total_rows"])
        return {"first_row": first_row}

    def reissue(self, stream_id: str) -> Any:
        """The ticket of the next epoch, or None when the stream needs no sender."""
        known, tickets = threading.Event(), []

        def on_ticket(ticket: Ticket | None) -> None:
            tickets.append(ticket)
            known.set()

        self.receiver.reissue(stream_id, on_ticket)
        assert known.wait(WAIT_S), "no answer to reissue"
        (ticket,) = tickets
        return {"ticket": None if ticket is None else {**ticket.to_body(), "secret": ticket.secret.hex()}}

    def sender_lost(self, stream_id: str) -> Any:
        self.receiver.sender_lost(stream_id)
        return {}

    def advance(self, seconds: float) -> Any:
        """Set this peer's clock forward."""
        self.clock.advance(seconds)
        return {}

    def restart_loop(self) -> Any:
        """What the service does when the endpoint's loop died and was started anew."""
        self.service.post(self.receiver.restart_loop)
        return {}

    def cut_lifelines(self) -> Any:
        """End the connections that keep segments in use, as if something between the processes had."""
        cut = [mapped for of_peer in self.sender._guest._mapped.values() for mapped in of_peer.values()]
        self.service.post(lambda: [mapped.lifeline.close() for mapped in cut] and None)
        return {"cut": len(cut)}

    def write(self, stream_id: str, first_row: int, until: int) -> Any:
        self._producers[stream_id].write(first_row, until)
        return {}

    def end(self, stream_id: str, side: str) -> Any:
        if side == "sender":
            self._producers[stream_id].stream.abort("Cancelled", "the test asks for it")
        else:
            self._consumers[stream_id].close()
        return {}

    def consumed(self, stream_ids: list[str]) -> Any:
        return {"streams": [self._consumers[stream_id].report() for stream_id in stream_ids]}

    def produced(self, stream_ids: list[str]) -> Any:
        return {"streams": [self._producers[stream_id].report() for stream_id in stream_ids]}

    def forget(self, stream_ids: list[str]) -> Any:
        """Drop what is known of these streams, so that only leaks remain."""
        for stream_id in stream_ids:
            self._consumers.pop(stream_id, None)
            self._producers.pop(stream_id, None)
        return {}

    def stats(self) -> Any:
        """Both sides' counters, added where both have one."""
        counts: Counter[str] = Counter()
        for side in (self.service, self.receiver, self.sender):
            counts.update(side.stats())
        return dict(counts)

    def inventory(self) -> Any:
        """Open descriptors by kind, shared mappings by name, threads by name, resident KiB."""
        return {
            "descriptors": dict(Counter(map(_kind_of_descriptor, os.listdir("/proc/self/fd")))),
            "shared_mappings": dict(Counter(_shared_mappings())),
            "threads": sorted(thread.name.split(" ")[0] for thread in threading.enumerate()),
            "num_tasks": len(os.listdir("/proc/self/task")),
            "resident_kib": _resident_kib(),
        }

    def relay(self, listen: str, upstream: str, faults: dict[str, Any]) -> Any:
        """A chaos proxy in this process."""
        self.proxy = ChaosProxy(listen, upstream, Faults(**faults))
        self.proxy.start()
        return {"address": self.proxy.address}

    def relayed(self) -> Any:
        return self.proxy.counts()

    def close(self) -> Any:
        if hasattr(self, "proxy"):
            self.proxy.close()
        if hasattr(self, "service"):
            self.service.close()
        return {}


def ticket_of(body: dict[str, Any]) -> Ticket:
    """A ticket that travelled as JSON."""
    return Ticket.from_body(body | {"secret": bytes.fromhex(body["secret"])})


def _kind_of_descriptor(name: str) -> str:
    try:
        return _kind(os.readlink(f"/proc/self/fd/{name}").split(":[")[0])
    except OSError:
        return "of the listing itself"


def _shared_mappings() -> list[str]:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        fields = [line.split(maxsplit=5) for line in maps]
    return [_kind(parts[5].strip()) if len(parts) > 5 else "anonymous" for parts in fields if parts[1][3] == "s"]


def _kind(path: str) -> str:
    """Without the number of a segment: one may be replaced by another."""
    return re.sub(r"memfd:tandem-[0-9a-f]+", "memfd:tandem", path)


def _resident_kib() -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def serve(control: socket.socket) -> None:
    """Answer commands until the input ends."""
    host = Host()
    with control, control.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            values = json.loads(line)
            action: Callable[..., Any] = getattr(host, values.pop("do"))
            try:
                answer = action(**values)
            except Exception as error:  # told to the parent, whose test fails with it
                answer = {"error": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
            control.sendall(json.dumps(answer).encode() + b"\n")
    host.close()
