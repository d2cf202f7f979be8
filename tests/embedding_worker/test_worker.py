"""The worker behind real services and streams: what arrives, what fails, and that nothing is left."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from embedding_worker.api import EmbedRequest
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import InvalidEmbedRequest
from embedding_worker.preprocess import ImageLimits, prepare_image
from embedding_worker.runner import VisionRunner
from embedding_worker.worker import EmbeddingWorker
from tests.embedding_worker.images import BAD, png
from tests.tiny_models import make_qwen2_5_vl
from tests.waiting import eventually
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import RemoteFailure, TransferError
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import StreamSender
from transfer.tensors import PlaneSpec

WAIT_S = 60.0
HIDDEN = 64
MEDIA = (png(120, 90), png(28, 28), png(200, 56), png(1, 1), png(120, 90))
_names = itertools.count()


@dataclasses.dataclass(eq=False)
class Consumer:
    """The receiving end of one request: copies rows, notes how stream and call ended."""

    receiver: StreamReceiver
    stream_id: str
    admit: bool = True
    rows: torch.Tensor | None = None
    items: Sequence[Mapping[str, Any]] = ()
    stream_error: TransferError | None = None
    body: dict[str, Any] | None = None
    call_error: RemoteFailure | None = None
    num_restarts: int = 0
    num_rows: int = 0
    first_rows: list[int] = dataclasses.field(default_factory=list)
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    announced: threading.Event = dataclasses.field(default_factory=threading.Event)
    stream_over: threading.Event = dataclasses.field(default_factory=threading.Event)
    call_over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def on_announce(self, total_rows: int, items: Sequence[Mapping[str, Any]]) -> None:
        self.rows, self.items = torch.full((total_rows, HIDDEN), float("nan")), items
        self.announced.set()
        if self.admit:
            self.receiver.admit(self.stream_id)

    def on_rows(self, first_row: int, planes: Mapping[str, Any]) -> None:
        assert self.rows is not None
        end = first_row + planes["embeddings"].shape[0]
        self.rows[first_row:end] = planes["embeddings"]
        with self.changed:
            self.first_rows.append(first_row)
            self.num_rows = end
            self.changed.notify_all()

    def on_restart(self) -> None:
        self.num_restarts += 1

    def on_complete(self, stats: object) -> None:
        self.stream_over.set()

    def on_failed(self, error: TransferError) -> None:
        self.stream_error = error
        self.stream_over.set()

    def await_rows(self, num_rows: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_rows >= num_rows, WAIT_S)

    def on_end(self, body: dict[str, Any] | None, error: RemoteFailure | None) -> None:
        self.body, self.call_error = body, error
        self.call_over.set()

    def wait(self) -> Consumer:
        assert self.call_over.wait(WAIT_S) and self.stream_over.wait(WAIT_S), "call or stream never ended"
        return self


class Rig:
    """One worker and one peer that calls it and receives, over endpoints of the given kind."""

    def __init__(self, folder: Path, address: Callable[[str], str], **config: Any) -> None:
        name = f"rig-{next(_names)}"
        transfer = TransferConfig(**{"peer_timeout_s": 600.0, **config})
        self.worker = EmbeddingWorker(
            folder, EmbedConfig(device="cpu"), transfer, open_endpoint(address(f"{name}-worker"), transfer)
        )
        self.endpoint = open_endpoint(address(f"{name}-peer"), transfer)
        self.service = Service(self.endpoint, transfer)
        plane = PlaneSpec(name="embeddings", dtype="float32", row_shape=(HIDDEN,))
        self.receiver = StreamReceiver(self.service, transfer, (plane,))
        self.worker.start()
        self.service.start()
        self.connection = self.endpoint.connect(self.worker.address, self.worker.public_key)

    def embed(self, *media: bytes, admit: bool = True, **changes: Any) -> Consumer:
        ticket = Ticket.issue("test")
        consumer = Consumer(receiver=self.receiver, stream_id=ticket.stream_id, admit=admit)
        self.receiver.open(ticket, consumer)
        return self.call_embed(ticket, consumer, media, **changes)

    def call_embed(self, ticket: Ticket, consumer: Consumer, media: Sequence[bytes], /, **changes: Any) -> Consumer:
        request = EmbedRequest(
            ticket=ticket,
            receiver_address=self.endpoint.address,
            receiver_public_key=self.endpoint.public_key,
            num_items=len(media),
            deadline_ms=60_000,
        )
        body = request.to_body() | changes
        self.call = self.service.call(self.connection, "embed", body, media, on_end=consumer.on_end)
        return consumer

    def stats(self) -> dict[str, Any]:
        answer: list[dict[str, Any]] = []
        over = threading.Event()

        def on_end(body: dict[str, Any] | None, error: RemoteFailure | None) -> None:
            assert body is not None, error
            answer.append(body)
            over.set()

        self.service.call(self.connection, "stats", {}, on_end=on_end)
        assert over.wait(WAIT_S)
        return answer[0]

    def close(self) -> None:
        self.worker.close()
        self.service.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("model"), seed=8, max_pixels=28 * 28 * 30, hidden_size=HIDDEN)


@pytest.fixture
def make_rig(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    kinds: dict[str, Callable[[str], str]] = {
        "inproc": lambda name: f"inproc://{name}",
        "tcp": lambda name: "tcp://127.0.0.1:0",
    }
    rigs: list[Rig] = []

    def make(kind: str = "inproc", **config: Any) -> Rig:
        rigs.append(Rig(folder, kinds[kind], **config))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[..., torch.Tensor]:
    runner = VisionRunner.load(folder, EmbedConfig(device="cpu"))
    limits = ImageLimits(max_bytes=10**8, max_pixels=10**8)

    def encode(*media: bytes) -> torch.Tensor:
        images = [prepare_image(medium, 0, runner.settings, limits) for medium in media]
        return torch.cat([runner.encode([image])[0] for image in images])

    return encode


def _assert_right(consumer: Consumer, rows: torch.Tensor) -> dict[str, Any]:
    consumer.wait()
    assert (consumer.call_error, consumer.stream_error) == (None, None)
    assert consumer.rows is not None and consumer.body is not None
    torch.testing.assert_close(consumer.rows, rows, rtol=0, atol=2e-5)
    assert consumer.body["rows"] == rows.shape[0] == sum(item["rows"] for item in consumer.items)
    return consumer.body


@pytest.mark.parametrize("kind", ["inproc", "tcp"])
@pytest.mark.parametrize(
    ("block_size", "default", "rounds"), [(128, 8192, 1), (16, 8000, 1), (16, 1, None), (5, 10, None)]
)
def test_all_rows_arrive_in_prompt_order(
    make_rig: Any, expected: Any, kind: str, block_size: int, default: int, rounds: int | None
) -> None:
    rig = make_rig(kind, block_size=block_size, default_allocate_tokens=default)
    rows = expected(*MEDIA)
    body = _assert_right(rig.embed(*MEDIA), rows)
    assert body["blocks"] == -(-rows.shape[0] // block_size)
    assert body["bytes"] == rows.numel() * 4
    assert body["grant_rounds"] == rounds if rounds else body["grant_rounds"] > 1
    assert body["cache_hits"] == 1, "the last image is the first again"
    assert body["encode_ms"] > 0 < body["preprocess_ms"]


def test_announced_items_carry_grids_and_keys(make_rig: Any, expected: Any) -> None:
    consumer = make_rig().embed(*MEDIA)
    _assert_right(consumer, expected(*MEDIA))
    assert [item["grid"] for item in consumer.items] == [[1, 6, 8], [1, 2, 2], [1, 4, 14], [1, 2, 2], [1, 6, 8]]
    keys = [item["content_key"] for item in consumer.items]
    assert keys[0] == keys[4] and len(set(keys)) == 4


def test_many_requests_at_once_and_an_empty_ledger_afterwards(make_rig: Any, expected: Any) -> None:
    rig = make_rig(block_size=16, pool_tokens=160, default_allocate_tokens=32)
    prompts = [[png(40 + 7 * i, 60 + j, seed=i % 3) for j in range(1 + i % 3)] for i in range(12)]
    consumers = [rig.embed(*media) for media in prompts]
    for consumer, media in zip(consumers, prompts, strict=True):
        _assert_right(consumer, expected(*media))
    stats = rig.stats()
    assert stats["transfer_streams_sending"] == stats["embed_requests_open"] == stats["embed_patches_waiting"] == 0
    assert stats["embed_requests"] == 12
    assert stats["embed_items_encoded"] + stats["embed_cache_hits"] == sum(map(len, prompts))
    ledger = rig.receiver.stats()
    assert ledger["transfer_blocks_in_use"] == ledger["transfer_streams_open"] == ledger["transfer_tickets_open"] == 0


@pytest.mark.parametrize("kind", ["png cut short", "text", "3 by 2000", "bomb"])
def test_a_bad_image_fails_its_call_and_its_stream_only(make_rig: Any, expected: Any, kind: str) -> None:
    make, code = BAD[kind]
    rig = make_rig()
    good, bad = rig.embed(MEDIA[0]), rig.embed(MEDIA[0], make(), MEDIA[1])
    bad.wait()
    assert bad.call_error is not None and bad.stream_error is not None
    assert bad.call_error.code == code
    assert "image 1: " in bad.call_error.message
    assert code in str(bad.stream_error)
    _assert_right(good, expected(MEDIA[0]))
    _assert_right(rig.embed(*MEDIA), expected(*MEDIA))


def test_malformed_calls_are_refused(make_rig: Any, expected: Any) -> None:
    rig = make_rig()
    for changes, message in (
        ({"num_items": 2}, "the call carries 1 media"),
        ({"num_items": 0}, "num_items must be a positive integer"),
        ({"deadline_ms": "soon"}, "deadline_ms must be a positive integer"),
        ({"deadline_ms": 2**63 - 1}, "deadline_ms must be at most 1000000000000"),
        ({"ticket": {"stream_id": "x"}}, "a ticket is a map"),
        ({"receiver": "inproc://there"}, "receiver is a map"),
        ({"media_key": 5}, "media_key must be a string"),
        ({"media_key": "k" * 129}, "at most 128 characters"),
        ({"extra": 1}, "needs ticket, receiver"),
    ):
        consumer = rig.embed(MEDIA[1], **changes)
        assert consumer.call_over.wait(WAIT_S)
        assert consumer.call_error is not None
        assert consumer.call_error.code == InvalidEmbedRequest.__name__
        assert message in consumer.call_error.message
        rig.receiver.close(consumer.stream_id)
    _assert_right(rig.embed(MEDIA[1]), expected(MEDIA[1]))


def test_too_many_images_and_a_passed_deadline(make_rig: Any) -> None:
    rig = make_rig()
    many = rig.embed(*[MEDIA[1]] * 257)
    assert many.call_over.wait(WAIT_S)
    assert many.call_error is not None and many.call_error.code == "TooManyImages"
    assert "257 images, at most 256" in many.call_error.message


def test_a_cancelled_call_ends_its_stream(make_rig: Any, expected: Any) -> None:
    rig = make_rig()
    consumer = rig.embed(*MEDIA, admit=False)  # without admission the stream cannot complete
    assert consumer.announced.wait(WAIT_S)
    rig.call.cancel()
    consumer.wait()
    assert consumer.call_error is not None and consumer.call_error.code == "Cancelled"
    assert "Cancelled" in str(consumer.stream_error)
    _assert_right(rig.embed(*MEDIA), expected(*MEDIA))
    assert rig.stats()["embed_requests_open"] == 0


def test_a_receiver_that_gives_up_ends_the_call(make_rig: Any, expected: Any) -> None:
    rig = make_rig()
    consumer = rig.embed(*MEDIA, admit=False)
    assert consumer.announced.wait(WAIT_S)
    rig.receiver.abort(consumer.stream_id, "PromptTooLong", "no room")
    assert consumer.call_over.wait(WAIT_S)
    assert consumer.call_error is not None and consumer.call_error.code == "PromptTooLong"
    _assert_right(rig.embed(*MEDIA), expected(*MEDIA))


def test_closing_the_worker_fails_open_calls_and_is_idempotent(make_rig: Any) -> None:
    rig = make_rig(block_size=4, default_allocate_tokens=4, pool_tokens=4)  # not all rows fit
    consumer = rig.embed(*MEDIA, admit=False)
    assert consumer.announced.wait(WAIT_S)
    assert rig.worker.is_healthy
    rig.worker.close()
    rig.worker.close()
    assert not rig.worker.is_healthy
    assert consumer.stream_over.wait(WAIT_S)
    assert consumer.stream_error is not None
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("embed-")]


def test_rows_that_have_all_come_outlive_their_worker(make_rig: Any, expected: Any) -> None:
    rig = make_rig()
    consumer = rig.embed(*MEDIA, admit=False)
    rows = expected(*MEDIA)
    num_blocks = -(-len(rows) // rig.service.config.block_size)
    eventually(lambda: rig.receiver.stats().get("transfer_blocks_received_total") == num_blocks, "rows are missing")
    rig.worker.close()
    assert consumer.call_over.wait(WAIT_S) and consumer.call_error is not None
    rig.receiver.admit(consumer.stream_id)
    assert consumer.stream_over.wait(WAIT_S) and consumer.stream_error is None
    torch.testing.assert_close(consumer.rows, rows, rtol=0, atol=2e-5)


# -- taking over ------------------------------------------------------------------------------------------------------


class FirstSender:
    """Another worker's half of a stream: it says it has the same content, writes some rows, and is lost."""

    def __init__(self, rig: Rig, ticket: Ticket, content_key: str) -> None:
        name = f"inproc://first-{next(_names)}"
        self.service = Service(open_endpoint(name), rig.service.config)
        self.sender = StreamSender(self.service, rig.service.config)
        self.service.start()
        plane = PlaneSpec(name="embeddings", dtype="float32", row_shape=(HIDDEN,))
        self.stream = self.sender.open(ticket, rig.endpoint.address, None, (plane,), content_key)

    def write(self, items: Sequence[Mapping[str, Any]], rows: torch.Tensor) -> None:
        self.stream.announce(sum(item["rows"] for item in items), items)
        self.stream.write(0, {"embeddings": rows})


def _take_over(rig: Rig, consumer: Consumer, media: Sequence[bytes], media_key: str) -> Consumer:
    tickets: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
    rig.receiver.reissue(consumer.stream_id, tickets.put)
    ticket = tickets.get(timeout=WAIT_S)
    assert ticket is not None and ticket.epoch == 2
    return rig.call_embed(ticket, consumer, media, media_key=media_key)


@pytest.mark.parametrize("num_rows", [0, 3, 20, 33])
@pytest.mark.parametrize("is_same", [True, False], ids=["same key", "other key"])
def test_a_stream_is_taken_over_where_its_first_sender_stopped(
    make_rig: Any, expected: Any, num_rows: int, is_same: bool
) -> None:
    items = make_rig(block_size=4).embed(*MEDIA).wait().items
    rig = make_rig(block_size=4)  # whose cache is empty
    right = expected(*MEDIA)
    ticket = Ticket.issue("test")
    consumer = Consumer(receiver=rig.receiver, stream_id=ticket.stream_id)
    rig.receiver.open(ticket, consumer, take_over_s=WAIT_S)
    first = FirstSender(rig, ticket, rig.worker._runner.stream_key("media"))
    first.write(items, right[:num_rows].clone())
    num_whole = num_rows // 4 * 4
    assert consumer.announced.wait(WAIT_S)
    consumer.await_rows(num_whole)
    _assert_right(_take_over(rig, consumer, MEDIA, "media" if is_same else "other media"), right)
    assert consumer.num_restarts == (0 if is_same else 1)
    assert consumer.first_rows.count(0) == (1 if is_same or not num_whole else 2)
    ends = list(itertools.accumulate(item["rows"] for item in items))
    distinct = {MEDIA[i] for i, end in enumerate(ends) if not is_same or end > num_whole}
    assert rig.stats()["embed_items_encoded"] == len(distinct)
    with pytest.raises(TransferError):
        first.stream.result(WAIT_S)
    first.service.close()


def test_a_take_over_that_nobody_accepts_ends_with_its_call(make_rig: Any) -> None:
    rig = make_rig(idle_timeout_s=1.0, stream_timeout_s=1.0)
    ticket = dataclasses.replace(Ticket.issue("test"), epoch=2)
    consumer = Consumer(receiver=rig.receiver, stream_id=ticket.stream_id)
    rig.call_embed(ticket, consumer, MEDIA[:1])
    assert consumer.call_over.wait(WAIT_S) and consumer.call_error is not None
    assert rig.stats()["embed_requests"] == rig.stats()["embed_requests_open"] == 0
