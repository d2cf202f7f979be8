"""Fuzzes live sessions: real services over a virtual network, whose messages are mutated, repeated and made up.

    python -m tests.transfer.fuzz.session --inputs 100000 --seed 0 --payload segments

Two streams run at a time. One is fuzzed, by a peer that lies under its right name and by a stranger: it may fail with a
typed error, but no wrong row ever comes out, nothing raises, nothing storms, and its ledger goes to zero. The other is
left alone and must arrive whole. Where memory is shared, seals are damaged and lifelines end, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch

from tests.transfer.fuzz.memory import Memory
from tests.transfer.fuzz.mutate import mutate_bytes, mutate_header, mutate_message, repaired
from tests.transfer.fuzz.pairs import PAIRS
from tests.transfer.fuzz.samples import sample_messages
from tests.transfer.virtual import Pair, VirtualEndpoint, VirtualNetwork, make_rows
from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.errors import LocalProtocolError, MalformedMessage, TransferError, error_code
from transfer.memory.segment_area import SegmentArea
from transfer.memory.segments import SEAL_BYTES
from transfer.protocol.messages import Block, Message, Probe
from transfer.protocol.ticket import Ticket
from transfer.protocol.wire import decode_header, encode_header
from transfer.streams.stream_sender import OutgoingStream

CONFIG = TransferConfig(
    block_size=16, default_allocate_tokens=48, pool_tokens=16 * 8, credit_window_blocks=3, ping_interval_s=0.2,
    peer_timeout_s=5.0, idle_timeout_s=2.0, stream_timeout_s=3.0, admit_timeout_s=3.0,
)  # fmt: skip
RECEIVER, SENDER, STRANGER = "virtual://receiver", "virtual://sender", "virtual://stranger"
MAX_MESSAGES_PER_INSTANT = 5000
MAX_INPUTS_PER_STREAM = 60
MAX_GROWTH_KIB = 64 * 1024
DEADLINE_S = 10.0  # a peer that says it is busy is believed until then
LIMIT_S = 20.0


class Listener:
    """A consumer that notes what must not happen; it never raises, or the receiver would blame it."""

    def __init__(self, pair: Pair, ticket: Ticket, data: Mapping[str, torch.Tensor]) -> None:
        self._pair, self._stream_id, self._data = pair, ticket.stream_id, data
        self.num_rows, self.wrong = 0, ""
        self.end: str | None = None  # "complete" or the code of an error, which may be empty

    def on_announce(self, total_rows: int, items: Sequence[object]) -> None:
        self._note(self.end is not None, "announced after the end")
        self._pair.receiver.admit(self._stream_id)

    def on_rows(self, first_row: int, planes: Mapping[str, torch.Tensor]) -> None:
        self._note(self.end is not None, "rows after the end")
        self._note(first_row != self.num_rows, f"row {first_row} after {self.num_rows} rows")
        for name, rows in planes.items():
            right = self._data[name][first_row : first_row + len(rows)]
            self._note(not torch.equal(rows, right), f"wrong rows in {name} at {first_row}")
        self.num_rows = first_row + len(planes["token_ids"])

    def on_restart(self) -> None:
        self._note(self.end is not None, "restarted after the end")
        self.num_rows = 0

    def on_complete(self, stats: object) -> None:
        self._note(self.end is not None, "ended twice")
        self.end = "complete"

    def on_failed(self, error: TransferError) -> None:
        self._note(self.end is not None, "ended twice")
        self.end = error_code(error)

    def _note(self, is_wrong: bool, what: str) -> None:
        if is_wrong and not self.wrong:
            self.wrong = what


class SessionFuzzer:
    """One pair of workers and a stranger, for any number of streams."""

    def __init__(self, seed: int, payload: str = "wire") -> None:
        self.rng = random.Random(seed)
        self.network = VirtualNetwork(seed)
        self.pair = PAIRS[payload](CONFIG, network=self.network)
        for sender in (self.pair.sender, self.pair.beside):
            sender._token_bytes = secrets.token_bytes  # as it is now, and not when the class was made
        self.stranger = VirtualEndpoint(self.network, STRANGER)
        self.stranger.start(lambda connection, message, frames: None)
        self.network.rewrite = self._rewrite
        self.num_inputs = 0
        self.outcomes: Counter[str] = Counter()
        self._victim = ""
        self._budget = 0
        self._rate = 0.0
        self._burst = 0
        self._seen: list[tuple[bool, Message, list[bytes]]] = []  # (to the receiver, ...) of the victim
        self._samples = list(sample_messages().values())

    def run_stream(self) -> None:
        """One fuzzed stream beside one that is left alone."""
        rng, network, pair = self.rng, self.network, self.pair
        self._budget, self._rate = MAX_INPUTS_PER_STREAM, rng.choice((0.02, 0.1, 0.4))
        sizes = [rng.choice((0, 1, 16, 17, 100, 200)) for _ in range(2)]
        streams, listeners = [], []
        for is_victim, num_rows in zip((True, False), sizes, strict=True):
            ticket, data = Ticket.issue("fuzz"), make_rows(max(1, num_rows), seed=rng.randrange(10**6))
            data = {name: rows[:num_rows] for name, rows in data.items()}
            if is_victim:
                self._victim = ticket.stream_id
            listeners.append(Listener(pair, ticket, data))
            pair.receiver.open(ticket, listeners[-1], take_over_s=rng.choice((0.0, 0.5)), deadline_s=DEADLINE_S)
            sender = pair.sender if is_victim else pair.beside
            streams.append(pair.send(ticket, sender=sender, content_key="key", deadline_s=DEADLINE_S))
            streams[-1].announce(num_rows, [{"rows": num_rows}])
            if num_rows:
                streams[-1].write(0, data)
        end_s = network.now + LIMIT_S
        while not (all(listener.end is not None for listener in listeners) and self._is_sender_idle()):
            ends = [listener.end for listener in listeners]
            assert network.now < end_s, f"not over after {LIMIT_S} s: {ends}, {pair.sender.stats()}"
            if self._budget > 0 and self._seen and rng.random() < 0.5:
                self._inject()
            self._burst = 0
            network.advance(0.05)
        self._budget = 0
        self._check(streams, listeners, sizes)
        network.log.clear()
        self._seen.clear()

    def _is_sender_idle(self) -> bool:
        senders = (self.pair.sender, self.pair.beside)
        return not any(sender.stats()["transfer_streams_sending"] for sender in senders)

    def _check(self, streams: list[OutgoingStream], listeners: list[Listener], sizes: list[int]) -> None:
        assert not any(listener.wrong for listener in listeners), [listener.wrong for listener in listeners]
        assert (listeners[1].end, listeners[1].num_rows) == ("complete", sizes[1]), "the stream beside was harmed"
        streams[1].result(0)
        self.outcomes[str(listeners[0].end)[:40]] += 1
        stats = self.pair.receiver.stats()
        held = {name: stats[f"transfer_{name}"] for name in ("blocks_in_use", "streams_open", "tickets_open")}
        assert not any(held.values()), held

    # -- what is fed ----------------------------------------------------------------------------------------------

    def _rewrite(self, message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        self._burst += 1
        assert self._burst < MAX_MESSAGES_PER_INSTANT, f"a storm of messages, the last: {message}"
        if getattr(message, "stream_id", None) != self._victim:
            return message, frames
        if len(self._seen) < 200:
            self._seen.append((type(message).__name__ in UPWARD, message, frames))
        if self._budget <= 0 or self.rng.random() >= self._rate:
            return message, frames
        return self._mutant(message, frames)

    def _inject(self) -> None:
        """Something seen before, or any kind of message, mutated or not, from the peer itself or from a stranger."""
        rng = self.rng
        segment = self.pair.segment_of(self._victim)
        if segment is not None and rng.random() < 0.1:
            return self._harm(segment)
        upward, message, frames = rng.choice(self._seen)
        if rng.random() < 0.3:
            message, num_frames = rng.choice(self._samples)
            frames = [rng.randbytes(rng.choice((0, 1, 64, 96))) for _ in range(num_frames)]
            if hasattr(message, "stream_id"):
                message = type(message)(**{**_fields(message), "stream_id": self._victim})
            upward = rng.random() < 0.5
        mutant = self._mutant(message, frames) if rng.random() < 0.8 else (message, frames)
        if mutant is None:
            return
        target, source = (RECEIVER, SENDER) if upward else (SENDER, RECEIVER)
        endpoints = self.network.endpoints
        if rng.random() < 0.3 or not upward:
            known = [c for e, c, _, _ in self.network.log if e is endpoints[target] and self._may_lie(c, mutant[0])]
            if rng.random() < 0.5 or not known:
                sender = self.stranger
                sender.send(sender.connect(target), *mutant)
            else:
                endpoints[target].deliver(known[-1], *mutant)
        else:
            endpoints[source].send(endpoints[source].connect(target), *mutant)

    def _may_lie(self, connection: Connection, message: Message) -> bool:
        """Whether a message can come over a connection that is the lying peer's own."""
        if connection.is_sealed_path:
            return isinstance(message, (Block, Probe))
        return connection.peer in (SENDER, RECEIVER)

    def _harm(self, segment: SegmentArea) -> None:
        """What a lying peer can do to the memory it shares: damage a seal, or hang up."""
        rng, generation = self.rng, segment.segment.generation
        self.num_inputs += 1
        self._budget -= 1
        if rng.random() < 0.2 and generation in self.pair.passing.lifelines:
            self.outcomes["lifeline lost"] += 1
            for lifeline in self.pair.passing.lifelines.pop(generation):
                lifeline.close()
            self.pair.passing.on_lost[generation]()
            return
        self.outcomes["seal damaged"] += 1
        at = rng.randrange(segment.segment.layout.num_slots * SEAL_BYTES)
        segment.segment.memory[at] = rng.randrange(256)

    def _mutant(self, message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        """A changed message as it would come off the wire; None when the decoder refuses it."""
        rng = self.rng
        self.num_inputs += 1
        self._budget -= 1
        frames = list(frames)
        roll = rng.random()
        if frames and roll < 0.2:
            at = rng.randrange(len(frames))
            frames[at] = mutate_bytes(rng, frames[at], frames)
        elif frames and roll < 0.25:
            frames.pop()
        else:
            keep = ("stream_id",) if rng.random() < 0.9 else ()
            message = mutate_message(rng, message, keep)
        try:
            header = encode_header(message)
        except LocalProtocolError:
            return None
        if roll > 0.8:
            header = repaired(mutate_bytes(rng, header, [header])) if roll > 0.9 else mutate_header(rng, header)
        try:
            return decode_header(header, len(frames)), frames
        except MalformedMessage:
            self.outcomes["malformed"] += 1
            return None


UPWARD = {"Open", "Announce", "Block", "Probe", "Revoked", "Attached", "Filled", "Released"}


def _fields(message: Message) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


@contextlib.contextmanager
def secrets_of(seed: int) -> Iterator[None]:
    """Tickets, nonces and generations are drawn from a seed, so that a run can be repeated."""
    rng = random.Random(f"the secrets of {seed}")
    with mock.patch.multiple(
        secrets, token_bytes=rng.randbytes, token_hex=lambda size: rng.randbytes(size).hex(), randbits=rng.getrandbits
    ):
        yield


def fuzz(num_inputs: int, seed: int, payload: str = "wire") -> dict[str, Any]:
    """Run streams until so many inputs were fed. What came of them: the same again for the same arguments."""
    with secrets_of(seed):
        return _fuzz(num_inputs, seed, payload)


def _fuzz(num_inputs: int, seed: int, payload: str) -> dict[str, Any]:
    logging.disable(logging.CRITICAL)
    try:
        fuzzer, memory, num_streams = SessionFuzzer(seed, payload), None, 0
        started_s = time.perf_counter()
        while fuzzer.num_inputs < num_inputs:
            fuzzer.run_stream()
            num_streams += 1
            if memory is None and fuzzer.num_inputs > num_inputs // 4:
                memory = Memory()
        fuzzer.network.advance(10.0)  # what was parked is forgotten
        fuzzer.pair.assert_ledger_zero()
    finally:
        logging.disable(logging.NOTSET)
    assert memory is not None
    memory.check(MAX_GROWTH_KIB)
    dropped = {**fuzzer.pair.receiver.stats(), **fuzzer.pair.sender.stats()}
    return {
        "inputs": fuzzer.num_inputs,
        "streams": num_streams,
        "seconds": round(time.perf_counter() - started_s, 1),
        "grown_kib": memory.grown_kib(),
        "outcomes": dict(fuzzer.outcomes.most_common()),
        "dropped": {name: count for name, count in sorted(dropped.items()) if "dropped" in name},
    }


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--payload", choices=tuple(PAIRS), default="wire")
    options = parser.parse_args()
    print(json.dumps(fuzz(options.inputs, options.seed, options.payload), indent=2))


if __name__ == "__main__":
    main()
