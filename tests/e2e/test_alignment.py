"""A hostile sender at a language worker's own endpoint: what it says of its blocks must be what it was granted.

It holds a valid ticket and speaks the real wire; the worker answers with a typed abort, and requests that run meanwhile
finish as they do alone.
"""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from cluster import SamplingParams
from cluster.demo import MODEL_DIR, questions
from cluster.directory import WorkerAddress
from cluster.model_info import ModelInfo
from cluster.prompts import request_from_messages
from cluster.served import ServedRequest
from embedding_worker.config import EmbedConfig
from embedding_worker.worker import EmbeddingWorker
from language_worker.config import EngineConfig
from language_worker.worker import LanguageWorker
from tests.e2e.front import Front, Gathered
from tests.e2e.serving import LEDGER, NO_SPECIAL_TOKENS
from tests.waiting import eventually
from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import AlignmentError, IncompatibleBlocks, RemoteFailure, TransferError, error_from_code
from transfer.protocol.integrity import block_tag, tag_seed
from transfer.protocol.messages import Abort, Accept, Announce, Block, Close, Grant, Message
from transfer.protocol.negotiate import Offer
from transfer.protocol.ticket import Ticket, proven_open
from transfer.tensors import PlaneSpec

TRANSFER = TransferConfig(block_size=128, default_allocate_tokens=8000, pool_tokens=16 * 8064, peer_timeout_s=90.0)
PLANES = (PlaneSpec(name="embeddings", dtype="float32", row_shape=(192,)),)
ITEM = {"grid": [1, 4, 12], "rows": 12, "content_key": "00"}
WAIT_S = 120.0
NUM_TOKENS = 400


class HostileSender:
    """A sender's end of one stream, message by message."""

    def __init__(self, address: str, ticket: Ticket) -> None:
        self._ticket = ticket
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._endpoint = open_endpoint("tcp://127.0.0.1:0", TRANSFER)
        self._endpoint.start(self._on_message)
        self._connection = self._endpoint.connect(address)

    def _on_message(self, _: Connection, message: Message, frames: Sequence[memoryview]) -> None:
        if getattr(message, "stream_id", "") == self._ticket.stream_id:
            self._inbox.put(message)

    def send(self, message: Message, frames: Sequence[bytes] = ()) -> None:
        self._endpoint.send(self._connection, message, frames)

    def open(self, block_size: int = 128) -> None:
        offer = Offer(block_size=block_size, planes=PLANES, max_frame_bytes=1 << 20, credit=16)
        self.send(proven_open(self._ticket, bytes(16), offer, "", None))
        if block_size == TRANSFER.block_size:
            assert isinstance(self.next(), Accept)

    def announce(self, **changes: Any) -> None:
        honest = Announce(
            stream_id=self._ticket.stream_id,
            epoch=self._ticket.epoch,
            total_rows=12,
            allocated_tokens=8064,
            block_size=128,
            items=(ITEM,),
        )
        self.send(dataclasses.replace(honest, **changes))

    def send_block(self, block_id: int) -> None:
        """All 12 rows."""
        ticket, frames = self._ticket, [bytes(12 * 192 * 4)]
        tag = block_tag(tag_seed(ticket), ticket.stream_id, ticket.epoch, 0, block_id, 0, 12, 1, frames)
        block = Block(
            stream_id=ticket.stream_id,
            epoch=ticket.epoch,
            index=0,
            block_id=block_id,
            first_row=0,
            num_rows=12,
            serial=1,
            tag=tag,
        )
        self.send(block, frames)

    def next(self) -> Message:
        return self._inbox.get(timeout=WAIT_S)

    def close(self) -> None:
        self._endpoint.close()


class Workers:
    """Both workers and a front in this process, over loopback TCP."""

    def __init__(self, stack: ExitStack) -> None:
        engine = EngineConfig(dtype="float32", device="cpu", num_threads=1, kv_cache_tokens=8192)
        self.language = LanguageWorker(MODEL_DIR, engine, TRANSFER, open_endpoint("tcp://127.0.0.1:0", TRANSFER))
        stack.callback(self.language.close)
        embed = EmbedConfig(dtype="float32", device="cpu", num_threads=1, cache_tokens=0)
        self.embedding = EmbeddingWorker(str(MODEL_DIR), embed, TRANSFER, open_endpoint("tcp://127.0.0.1:0", TRANSFER))
        stack.callback(self.embedding.close)
        self.language.start()
        self.embedding.start()
        self.front = Front("tcp://127.0.0.1:0", TRANSFER)
        stack.callback(self.front.close)
        self.front.reach(
            [
                WorkerAddress(name="language-0", kind="language", address=self.language.address),
                WorkerAddress(name="embedding-0", kind="embedding", address=self.embedding.address),
            ]
        )
        self.info = ModelInfo.load(MODEL_DIR)

    def long_requests(self, num_tokens: int) -> list[ServedRequest]:
        """Some of the demo's questions, answered at length."""
        bias = {int(token): value for token, value in NO_SPECIAL_TOKENS.items()}
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logit_bias=bias)
        return [request_from_messages(self.info, _messages(i), params) for i in (0, 4, 6)]

    def ask(self, index: int) -> None:
        """One of the demo's questions is answered right; its image's embeddings come through the same receiver."""
        params = SamplingParams(max_tokens=16, temperature=0.0)
        sink, _ = self.front.submit(request_from_messages(self.info, _messages(index), params))
        sink.finish()
        assert "".join(chunk.text for chunk in sink.chunks) == questions()[index].answer

    def expect_stream(self) -> tuple[Ticket, queue.Queue[RemoteFailure | None]]:
        """Hand the worker a request whose embeddings will come with this ticket; and where its failure will be."""
        ticket, ends = Ticket.issue("hostile"), queue.Queue[RemoteFailure | None]()
        request = request_from_messages(self.info, _messages(0), SamplingParams(max_tokens=4))
        body = {
            "request_id": request.request_id,
            "prompt_token_ids": list(request.prompt_token_ids),
            "num_media": 1,
            "sampling": request.sampling.to_body(),
            "ticket": ticket.to_body(),
            "return_logits": False,
            "deadline_ms": 240_000,
        }
        (worker,) = (w for w in self.front.directory.all() if w.kind == "language")
        connection = self.front.directory.connection(worker)
        self.front.service.call(connection, "generate", body, on_end=lambda _, failure: ends.put(failure))
        return ticket, ends


def _messages(index: int) -> Any:
    question = questions()[index]
    image = {"type": "image", "image": str(question.image)}
    return [{"role": "user", "content": [image, {"type": "text", "text": question.text}]}]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(stack)


LIES: dict[str, tuple[dict[str, int], type[TransferError]]] = {
    "the number asked for": ({"allocated_tokens": 8000}, AlignmentError),
    "one more than granted": ({"allocated_tokens": 8065}, AlignmentError),
    "a block less": ({"allocated_tokens": 7936}, AlignmentError),
    "another block size": ({"block_size": 64}, IncompatibleBlocks),
}


def test_senders_that_misstate_their_blocks_are_aborted_and_others_go_on(workers: Workers) -> None:
    expected = [_finished(workers, request) for request in workers.long_requests(NUM_TOKENS)]
    for _ in range(5):
        if _lie_to_a_busy_worker(workers, expected):
            break
    else:
        raise AssertionError("the others were to run meanwhile")
    workers.ask(0)
    _await_empty(workers)


def _lie_to_a_busy_worker(workers: Workers, expected: list[list[int]]) -> bool:
    """While requests run that begin as expected; False: one was over before the last lie was told."""
    flights = [workers.front.submit(request) for request in workers.long_requests(6 * NUM_TOKENS)]
    for sink, _ in flights:
        assert sink.first_chunk.wait(WAIT_S)
    for changes, kind in LIES.values():
        _lie_in_the_announcement(workers, changes, kind)
        workers.ask(-2)
    _lie_in_the_opening(workers)
    did_run = all(not sink.over.is_set() for sink, _ in flights)
    for (sink, running), tokens in zip(flights, expected, strict=True):
        _await_tokens(sink)
        running.cancel()
        assert sink.over.wait(WAIT_S)
        assert sink.error is None or (isinstance(sink.error, RemoteFailure) and sink.error.code == "Cancelled")
        assert sink.tokens()[:NUM_TOKENS] == tokens
    return did_run


def _await_tokens(sink: Gathered) -> None:
    eventually(lambda: len(sink.tokens()) >= NUM_TOKENS or sink.error, "the answer is short")


def _finished(workers: Workers, request: ServedRequest) -> list[int]:
    sink, _ = workers.front.submit(request)
    sink.finish()
    return sink.tokens()


def _lie_in_the_announcement(workers: Workers, changes: dict[str, int], kind: type[TransferError]) -> None:
    with ExitStack() as stack:
        ticket, ends = workers.expect_stream()
        hostile = HostileSender(workers.language.address, ticket)
        stack.callback(hostile.close)
        hostile.open()
        grant = hostile.next()
        assert isinstance(grant, Grant)
        assert (len(grant.block_ids), grant.allocated_tokens, grant.block_size) == (63, 8064, 128)
        hostile.announce(**changes)
        _assert_aborted(hostile, ends, kind)
        hostile.send_block(grant.block_ids[0])  # it is no longer its own: nobody listens


def _lie_in_the_opening(workers: Workers) -> None:
    with ExitStack() as stack:
        ticket, ends = workers.expect_stream()
        hostile = HostileSender(workers.language.address, ticket)
        stack.callback(hostile.close)
        hostile.open(block_size=64)
        _assert_aborted(hostile, ends, IncompatibleBlocks)


def test_the_same_sender_is_heard_out_when_it_is_honest(workers: Workers) -> None:
    """So that the aborts above are owed to the lies."""
    with ExitStack() as stack:
        ticket, ends = workers.expect_stream()
        honest = HostileSender(workers.language.address, ticket)
        stack.callback(honest.close)
        honest.open()
        grant = honest.next()
        assert isinstance(grant, Grant)
        honest.announce()
        honest.send_block(grant.block_ids[0])
        answers = [honest.next()]
        while not isinstance(answers[-1], (Close, Abort)):
            answers.append(honest.next())
        assert isinstance(answers[-1], Close), answers
        assert ends.get(timeout=WAIT_S) is None
    _await_empty(workers)


def _assert_aborted(hostile: HostileSender, ends: queue.Queue[RemoteFailure | None], kind: type[TransferError]) -> None:
    """A typed abort at the sender and a failure of the request that names the same error."""
    abort = hostile.next()
    assert isinstance(abort, Abort), abort
    assert isinstance(error_from_code(abort.code, abort.message), kind), abort
    failure = ends.get(timeout=WAIT_S)
    assert failure is not None and failure.code == "MediaFailed"
    assert abort.code in failure.message


def _await_empty(workers: Workers) -> None:
    def left() -> dict[str, Any]:
        return {name: value for name, value in workers.language.stats().items() if name in LEDGER and value}

    eventually(lambda: not left(), lambda: f"left behind: {left()}")
