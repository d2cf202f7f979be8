"""The worker behind its endpoint: calls, streams and tokens over the in-memory transport, engine on its own thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker import delivery
from language_worker.api import TokenChunk
from language_worker.config import EngineConfig
from language_worker.delivery import logit_frames
from language_worker.sampling_params import SamplingParams
from language_worker.worker import LanguageWorker
from tests.language_worker.helpers import GREEDY, Media, drive, make_engine, prompt, request
from tests.tiny_tokenizer import TOKEN_IDS
from tests.waiting import eventually
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import RemoteFailure, TransferError
from transfer.memory.buffers import plane_of
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.streams.stream_sender import StreamSender

PAD = TOKEN_IDS["<|image_pad|>"]
WAIT_S = 120.0
PATIENT: dict[str, Any] = {
    "peer_timeout_s": 120.0,
    "idle_timeout_s": 120.0,
}  # nobody is lost here because a machine is slow
ENGINE = EngineConfig(dtype="float32", device="cpu", kv_cache_tokens=2048, max_model_len=512)
NAMES = itertools.count()
LEDGER = (
    "transfer_blocks_in_use",
    "transfer_streams_open",
    "transfer_tickets_open",
    "kv_pages_referenced",
    "num_requests_running",
    "num_requests_waiting",
    "input_buffer_rows_reserved",
    "calls_incoming",
)


class Answer:
    """What one call got; `wait` blocks until its end."""

    def __init__(self) -> None:
        self.parts: list[tuple[dict[str, Any], list[bytes]]] = []
        self.body: dict[str, Any] | None = None
        self.failure: RemoteFailure | None = None
        self.ended = threading.Event()
        self.started = threading.Event()

    def on_part(self, body: dict[str, Any], frames: list[memoryview]) -> None:
        self.parts.append((body, [bytes(frame) for frame in frames]))
        self.started.set()

    def on_end(self, body: dict[str, Any] | None, failure: RemoteFailure | None) -> None:
        assert not self.ended.is_set()
        self.body, self.failure = body, failure
        self.ended.set()

    def wait(self) -> Answer:
        assert self.ended.wait(WAIT_S), "the call did not end"
        return self

    @property
    def tokens(self) -> list[int]:
        return [t for body, _ in self.parts for t in body.get("token_ids", ())]


class Client:
    """The other end: calls a worker and sends it embeddings."""

    def __init__(self, worker: LanguageWorker, transfer: TransferConfig) -> None:
        self.worker = worker
        self.service = Service(open_endpoint(f"inproc://client-{next(NAMES)}"), transfer)
        self.sender = StreamSender(self.service, transfer)
        self.service.start()
        self.connection = self.service.endpoint.connect(worker.address)

    def generate(self, **body: Any) -> tuple[Answer, Any]:
        answer = Answer()
        body = {"num_media": 0, "sampling": GREEDY.to_body(), "ticket": None, **body}
        call = self.service.call(self.connection, "generate", body, on_part=answer.on_part, on_end=answer.on_end)
        return answer, call

    def stream(self, ticket: Ticket, rows: torch.Tensor):
        return self.sender.open(ticket, self.worker.address, None, (plane_of("embeddings", rows),))

    def ledger(self) -> dict[str, Any]:
        """The worker's ledger by its "stats" method."""
        answer = Answer()
        self.service.call(self.connection, "stats", {}, on_end=answer.on_end)
        stats = answer.wait().body
        assert stats is not None
        return {name: stats[name] for name in LEDGER}

    def await_stream(self) -> None:
        """Wait until the worker expects a stream."""
        eventually(lambda: self.ledger()["transfer_streams_open"], "the worker expects no stream")

    def await_empty(self) -> None:
        """Wait until nothing is left but this very "stats" call."""

        def is_empty() -> bool:
            return all(value == (name == "calls_incoming") for name, value in self.ledger().items())

        eventually(is_empty, lambda: f"left behind: {self.ledger()}")


@pytest.fixture(params=[(16, 16, 64), (128, 8192, 65536)], ids=["small blocks", "default blocks"])
def client(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Client]:
    block_size, default, pool = request.param
    transfer = TransferConfig(
        block_size=block_size, default_allocate_tokens=default, pool_tokens=pool, input_buffer_tokens=400, **PATIENT
    )
    worker = LanguageWorker(tiny, ENGINE, transfer, open_endpoint(f"inproc://worker-{next(NAMES)}"))
    worker.start()
    made = Client(worker, transfer)
    yield made
    made.service.close()
    worker.close()
    worker.close()


def _media(rows: int, seed: int = 0) -> Media:
    return Media(grids=[(1, 2, 2 * rows)], rows=torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)))


def _send(client: Client, ticket: Ticket, media: Media, pieces: int = 3) -> Any:
    stream = client.stream(ticket, media.rows)
    stream.announce(media.rows.shape[0], media.items())
    first = 0
    for part in media.rows.chunk(pieces):
        stream.write(first, {"embeddings": part})
        first += part.shape[0]
    return stream


def test_text_request(client: Client, tiny: Path) -> None:
    ids = prompt(9)
    expected = drive(make_engine(tiny), [request("a", ids)])["a"]
    answer, _ = client.generate(request_id="a", prompt_token_ids=list(ids))
    answer.wait()
    assert answer.failure is None and answer.tokens == expected.tokens()
    chunks = [TokenChunk.from_body("a", body, num_prompt_tokens=9) for body, _ in answer.parts]
    assert chunks == expected.chunks
    assert [("num_prompt_tokens" in body) for body, _ in answer.parts] == [True] + [False] * (len(chunks) - 1)
    assert answer.body is not None and answer.body["num_prompt_tokens"] == 9 and answer.body["ttft_ms"] > 0
    client.await_empty()


def test_media_request_in_many_rounds(client: Client, tiny: Path) -> None:
    media, ids = _media(100), (1, 2, PAD, 3)
    expected = drive(make_engine(tiny), [request("a", ids, num_media=1)], {"a": media})["a"]
    ticket = Ticket.issue("a")
    answer, _ = client.generate(request_id="a", prompt_token_ids=list(ids), num_media=1, ticket=ticket.to_body())
    stats = _send(client, ticket, media).result(WAIT_S)
    answer.wait()
    assert answer.failure is None and answer.tokens == expected.tokens()
    assert answer.body is not None and answer.body["num_prompt_tokens"] == 103
    assert stats.num_bytes == media.rows.nbytes
    client.await_empty()


def test_logits_come_in_frames_that_fit(client: Client, tiny: Path) -> None:
    ids = prompt(30)
    expected = drive(make_engine(tiny), [request("a", ids, return_logits=True)])["a"]
    answer, _ = client.generate(request_id="a", prompt_token_ids=list(ids), return_logits=True)
    answer.wait()
    (body, (frame,)) = answer.parts[0]
    assert body["logits_shape"] == list(expected.logits.shape) and body["num_rows"] == 30
    got = torch.frombuffer(bytearray(frame), dtype=torch.float32).view(body["logits_shape"])
    torch.testing.assert_close(got, expected.logits)
    pieces = list(logit_frames(expected.logits, 7 * expected.logits.shape[1] * 4))
    assert [first for first, _ in pieces] == [0, 7, 14, 21, 28]
    assert torch.equal(torch.cat([rows for _, rows in pieces]), expected.logits)


def test_prompt_logprobs_come_in_parts_that_fit(client: Client, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PROMPT_LOGPROBS_PER_PART", 8)
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=2)
    for length in (1, 8, 30):
        ids, name = prompt(length), f"r{length}"
        expected = drive(make_engine(tiny), [request(name, ids, sampling)])[name]
        answer, _ = client.generate(request_id=name, prompt_token_ids=list(ids), sampling=sampling.to_body())
        answer.wait()
        bodies = [body for body, _ in answer.parts]
        slices = [body["prompt_logprobs_slice"] for body in bodies if "prompt_logprobs_slice" in body]
        first = bodies[len(slices)]
        assert [len(s) for s in (*slices, first["prompt_logprobs"])] == [8] * ((length - 1) // 8) + [
            (length - 1) % 8 + 1
        ]
        first["prompt_logprobs"] = [*(entry for s in slices for entry in s), *first["prompt_logprobs"]]
        chunks = [TokenChunk.from_body(name, body, length) for body in bodies[len(slices) :]]
        assert chunks == expected.chunks
    client.await_empty()


def test_many_requests_at_once_some_cancelled(client: Client, tiny: Path) -> None:
    """Forty mixed requests over an input buffer of four: the survivors equal their lone runs, nothing is left."""
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    cancelled = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)  # not over before it is told
    asked, media = {}, {}
    for i in range(40):
        name = f"r{i}"
        media[name] = _media(90 + i, seed=i) if i % 2 else None
        ids = (*prompt(3 + i, i), PAD, 5) if i % 2 else prompt(3 + i, i)
        sampling = GREEDY if i % 5 else cancelled if name.endswith("0") else long
        asked[name] = request(name, ids, sampling, num_media=i % 2)
    engine = make_engine(tiny)
    expected = {n: drive(engine, [r], {n: media[n]} if media[n] else {})[n].tokens() for n, r in asked.items()}
    answers = {}
    for name, one in asked.items():
        ticket = Ticket.issue(name) if media[name] else None
        answers[name], call = client.generate(
            request_id=name,
            prompt_token_ids=list(one.prompt_token_ids),
            num_media=one.num_media,
            sampling=one.sampling.to_body(),
            ticket=ticket.to_body() if ticket else None,
        )
        if ticket is not None:
            _send(client, ticket, media[name])
        if name.endswith("0"):
            call.cancel()
    for name, answer in answers.items():
        answer.wait()
        if name.endswith("0"):
            assert answer.failure is not None and answer.failure.code == "Cancelled"
        else:
            assert answer.failure is None, f"{name}: {answer.failure}"
            assert answer.tokens == expected[name]
    client.await_empty()


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"prompt_token_ids": [1, 99999]}, "InvalidRequest", "99999"),
        ({"prompt_token_ids": []}, "InvalidRequest", "prompt_token_ids"),
        ({"prompt_token_ids": [1] * 512}, "PromptTooLong", "512"),
        ({"prompt_token_ids": [PAD]}, "MediaMismatch", "placeholder"),
        ({"prompt_token_ids": [PAD], "num_media": 1}, "InvalidRequest", "ticket"),
        ({"prompt_token_ids": [1], "sampling": {"temperature": -1}}, "InvalidRequest", "temperature"),
        ({"prompt_token_ids": [PAD], "num_media": 1, "ticket": {"stream_id": "x"}}, "TicketRejected", ""),
        ({"prompt_token_ids": [1], "unknown": 1}, "InvalidRequest", "unknown"),
    ],
)
def test_bad_calls_fail_precisely_and_the_next_one_is_answered(client: Client, body, code, words) -> None:
    answer, _ = client.generate(request_id="bad", **body)
    answer.wait()
    assert answer.failure is not None and answer.failure.code == code and words in answer.failure.message
    good, _ = client.generate(request_id="good", prompt_token_ids=[1, 2])
    assert good.wait().failure is None
    client.await_empty()


def test_a_request_id_in_use_is_refused_and_the_first_goes_on(client: Client) -> None:
    ticket = Ticket.issue("a")
    first, _ = client.generate(request_id="a", prompt_token_ids=[1, PAD], num_media=1, ticket=ticket.to_body())
    second, _ = client.generate(request_id="a", prompt_token_ids=[1])
    second.wait()
    assert second.failure is not None and second.failure.code == "InvalidRequest"
    _send(client, ticket, _media(4))
    assert first.wait().failure is None


def test_an_aborted_stream_fails_its_request_with_the_reason(client: Client) -> None:
    ticket = Ticket.issue("a")
    answer, _ = client.generate(request_id="a", prompt_token_ids=[1, PAD], num_media=1, ticket=ticket.to_body())
    client.await_stream()
    stream = client.stream(ticket, torch.zeros(1, 64))
    stream.abort("BadImage", "image 0: truncated")
    answer.wait()
    assert answer.failure is not None and answer.failure.code == "MediaFailed"
    assert "BadImage" in answer.failure.message and "truncated" in answer.failure.message
    client.await_empty()


def test_an_announcement_that_does_not_fit_ends_both_sides(client: Client) -> None:
    ticket = Ticket.issue("a")
    answer, _ = client.generate(request_id="a", prompt_token_ids=[1, PAD], num_media=1, ticket=ticket.to_body())
    stream = _send(client, ticket, _media(401))
    answer.wait()
    assert answer.failure is not None and answer.failure.code == "MediaTooLarge" and "401" in answer.failure.message
    with pytest.raises(TransferError, match="MediaTooLarge"):
        stream.result(WAIT_S)
    client.await_empty()


def test_rows_of_another_width_end_the_stream_with_a_typed_error(client: Client) -> None:
    ticket = Ticket.issue("a")
    answer, _ = client.generate(request_id="a", prompt_token_ids=[1, PAD], num_media=1, ticket=ticket.to_body())
    stream = client.stream(ticket, torch.zeros(1, 63))
    with pytest.raises(TransferError):
        stream.result(WAIT_S)
    answer.wait()
    assert answer.failure is not None and answer.failure.code == "MediaFailed"
    client.await_empty()


def test_cancel_before_the_stream_opens_gives_everything_back(client: Client) -> None:
    ticket = Ticket.issue("a")
    answer, call = client.generate(request_id="a", prompt_token_ids=[1, PAD], num_media=1, ticket=ticket.to_body())
    call.cancel()
    assert answer.wait().failure.code == "Cancelled"
    client.await_empty()


def test_deadline_of_a_stream_that_never_comes(client: Client) -> None:
    ticket = Ticket.issue("a")
    answer, _ = client.generate(
        request_id="a", prompt_token_ids=[1, PAD], num_media=1, ticket=ticket.to_body(), deadline_ms=50
    )
    answer.wait()
    assert answer.failure is not None and answer.failure.code == "DeadlineExceeded"
    client.await_empty()


def test_close_fails_running_calls(client: Client) -> None:
    ticket = Ticket.issue("a")
    answer, _ = client.generate(request_id="a", prompt_token_ids=[1, PAD], num_media=1, ticket=ticket.to_body())
    client.ledger()
    assert client.worker.is_healthy
    client.worker.close()
    answer.wait()
    assert answer.failure is not None and answer.failure.code in ("EngineStopped", "PeerLost")
    assert not client.worker.is_healthy


def test_an_engine_that_breaks_fails_its_calls_and_says_so(client: Client) -> None:
    engine = client.worker._engine
    plan = engine.scheduler.plan

    def broken() -> Any:
        if not engine.scheduler.waiting:
            return plan()
        raise MemoryError("no more")

    engine.scheduler.plan = broken  # type: ignore[method-assign]
    answer, _ = client.generate(request_id="a", prompt_token_ids=[1])
    answer.wait()
    assert answer.failure is not None and answer.failure.code == "EngineFailed" and "no more" in answer.failure.message
    later, _ = client.generate(request_id="b", prompt_token_ids=[1])
    later.wait()
    assert later.failure is not None and "no more" in later.failure.message
    assert later.failure.code == "EngineStopped", "it was not there when the engine broke"
    assert not client.worker.is_healthy


def test_a_call_that_comes_while_the_engine_breaks_is_not_left_without_an_answer(client: Client) -> None:
    """It was let in while the engine still ran, and is submitted when nobody takes anything from the inbox any more."""
    worker = client.worker
    add = worker._delivery.add

    def broken() -> None:
        raise MemoryError("no more")

    def add_late(*args: Any, **options: Any) -> None:
        worker._engine.scheduler.plan = broken  # type: ignore[method-assign]
        worker._engine.wake()
        worker._thread.join(30)
        assert not worker._thread.is_alive()
        add(*args, **options)

    worker._delivery.add = add_late  # type: ignore[method-assign]
    answer, _ = client.generate(request_id="a", prompt_token_ids=[1])
    answer.wait()
    assert answer.failure is not None and answer.failure.code == "EngineStopped"
