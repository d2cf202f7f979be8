"""One request's path with workers that do exactly what a test says, in memory: both legs, retries, blame and cancels.

Nothing here waits for time to pass: a lost worker is one whose peer is dropped, or that says it stops.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

import cluster.attempt
import cluster.handoff
from cluster.directory import WorkerAddress, WorkerDirectory
from cluster.errors import NoWorker, RequestTimeout, WorkerLost
from cluster.handoff import MAX_ATTEMPTS, Handoff
from cluster.legs import TOKENS_PER_PART
from cluster.served import RequestStats, RunningRequest, ServedRequest
from language_worker.api import TokenChunk
from language_worker.sampling_params import SamplingParams
from tests.cluster.fake_workers import PATIENT, WAIT_S, FakeWorker, Names, end_generate, send_tokens
from tests.waiting import eventually
from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.endpoints.endpoint import open_endpoint
from transfer.endpoints.inproc_endpoint import PROCESS_NETWORK, Parcel
from transfer.errors import ConfigError, EndpointClosed, RemoteFailure
from transfer.protocol.messages import Call, End, Message, Parts
from transfer.protocol.ticket import Ticket
from transfer.service.calls import IncomingCall
from transfer.service.service import Service

IMAGES = (b"first image", b"second image")
SAMPLING = SamplingParams(max_tokens=3, temperature=0.0, seed=7)
EMBEDDED = {"encode_ms": 1.5, "rows": 4, "blocks": 1, "bytes": 64, "grant_rounds": 1}


class Outcome:
    """A Sink that insists on one end, with nothing after it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.stats: RequestStats | None = None
        self.error: Exception | None = None
        self.over = threading.Event()
        self.started = threading.Event()
        self.during_chunk: Callable[[], None] = lambda: None

    def on_chunk(self, chunk: TokenChunk) -> None:
        assert not self.over.is_set()
        self.tokens += chunk.token_ids
        self.started.set()
        self.during_chunk()

    def on_end(self, stats: RequestStats) -> None:
        assert not self.over.is_set()
        self.stats = stats
        self.over.set()

    def on_error(self, error: Exception) -> None:
        assert not self.over.is_set()
        self.error = error
        self.over.set()

    def wait(self) -> Outcome:
        assert self.over.wait(WAIT_S), "the request did not end"
        return self

    def failure(self) -> RemoteFailure:
        error = self.wait().error
        assert isinstance(error, RemoteFailure), error
        return error


class HookedDirectory(WorkerDirectory):
    """Tells a test when a connection is about to be used."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self.before_connection: Callable[[WorkerAddress], None] = lambda worker: None
        self.ended: dict[str, threading.Event] = {}

    def connection(self, worker: WorkerAddress) -> Connection:
        self.before_connection(worker)
        return super().connection(worker)

    def add_running(self, name: str, change: int) -> None:
        super().add_running(name, change)
        if change < 0 and name in self.ended:
            self.ended[name].set()


class Rig:
    """A front and its fake workers."""

    def __init__(self, num_language: int, num_embedding: int, config: TransferConfig) -> None:
        self.language = [FakeWorker("language", f"language-{i}") for i in range(num_language)]
        self.embedding = [FakeWorker("embedding", f"embedding-{i}") for i in range(num_embedding)]
        self.service = Service(open_endpoint(f"inproc://{Names.fresh('front')}"), config)
        self.service.start()
        self.directory = HookedDirectory(self.service)
        self.directory.replace([worker.entry for worker in self.language + self.embedding])
        self.attempts: list[str] = []
        self.handoff = Handoff(self.service, self.directory, self.attempts.append)

    def submit(self, media: tuple[bytes, ...] = (), **values: Any) -> tuple[Outcome, RunningRequest]:
        outcome = Outcome()
        values = {"sampling": SAMPLING, **values}
        request = ServedRequest(request_id=Names.fresh("request"), prompt_token_ids=(1, 2, 3), media=media, **values)
        return outcome, self.handoff.submit(request, outcome)

    def embed_call(self) -> tuple[FakeWorker, IncomingCall]:
        """The worker that the request's media went to, and the call."""
        found: list[FakeWorker] = []
        arrived = threading.Event()
        for _ in range(2000):
            found = [worker for worker in self.embedding if worker.has_calls()]
            if found:
                break
            arrived.wait(0.005)
        (worker,) = found
        return worker, worker.take("embed")

    def lose(self, worker: FakeWorker) -> None:
        """What a monitor does about a silent worker."""
        self.service.drop_peer(self.directory.connection(worker.entry), "no sign of life")

    def loads(self) -> set[int]:
        return {view.num_running for view in self.directory.views()}

    def close(self) -> None:
        self.service.close()
        for worker in self.language + self.embedding:
            worker.close()


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(num_language: int = 2, num_embedding: int = 2, config: TransferConfig | None = None) -> Rig:
        rigs.append(Rig(num_language, num_embedding, config or PATIENT))
        return rigs[-1]

    yield make
    for rig in rigs:
        try:
            is_settled = partial(_is_settled, rig)
            eventually(is_settled, "a request that ended still counts as running")
        finally:
            rig.close()


def _is_settled(rig: Rig) -> bool:
    return rig.service.stats()["calls_outgoing"] > 0 or rig.loads() == {0}


MakeRig = Callable[..., Rig]


def _serve(call: IncomingCall, *tokens: int) -> None:
    for token in tokens[:-1]:
        send_tokens(call, token)
    send_tokens(call, tokens[-1], finish_reason="stop")
    end_generate(call, len(tokens))


def test_an_answer_that_is_read_whole_may_come_in_larger_parts(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit(is_streamed=False)
    call = rig.language[0].take("generate")
    assert call.body["tokens_per_part"] == TOKENS_PER_PART
    _serve(call, 1)


def test_text_meets_a_language_worker_only(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, _ = rig.submit(timeout_s=60)
    call = rig.language[0].take("generate")
    assert 0 < call.body.pop("deadline_ms") <= 60_000
    assert call.body.pop("request_id").startswith("request-")
    assert call.body == {
        "prompt_token_ids": [1, 2, 3], "num_media": 0, "sampling": SAMPLING.to_body(), "ticket": None,
        "return_logits": False, "tokens_per_part": 1,
    }  # fmt: skip
    call.body["request_id"] = "x"
    _serve(call, 5, 6, 7)
    stats = outcome.wait().stats
    assert stats is not None and outcome.tokens == [5, 6, 7]
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (11, 3)
    assert stats.hops["language_worker"] == "language-0" and stats.hops["embedding_worker"] is None
    assert stats.hops["ttft_ms"] > 0 and stats.hops["prefill_and_decode_ms"] == 2.0
    assert not any(worker.has_calls() for worker in rig.embedding)


def test_media_go_to_an_embedding_worker_with_the_ticket_that_the_language_worker_has(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, _ = rig.submit(IMAGES, return_logits=True)
    generate = rig.language[0].take("generate")
    worker, embed = rig.embed_call()
    assert [bytes(frame) for frame in embed.frames] == list(IMAGES)
    assert embed.body["num_items"] == generate.body["num_media"] == 2
    assert embed.body["receiver"] == {"address": rig.language[0].entry.address, "public_key": None}
    assert Ticket.from_body(embed.body["ticket"]) == Ticket.from_body(generate.body["ticket"])
    assert embed.body["ticket"]["owner"] == generate.body["request_id"]
    embed.end(EMBEDDED)
    generate.reply({"logits_shape": [1, 2], "first_row": 0, "num_rows": 1}, [bytes(8)])
    _serve(generate, 5)
    stats = outcome.wait().stats
    assert stats is not None
    assert EMBEDDED.items() <= stats.hops.items()
    assert stats.hops["embedding_worker"] == worker.name
    assert [(body["logits_shape"], bytes(frame)) for body, frame in stats.hops["logits"]] == [([1, 2], bytes(8))]


@pytest.mark.parametrize("end", ["figures", "failure", "loss"])
def test_an_answer_that_is_complete_waits_for_the_figures_of_the_embed_call(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(cluster.attempt, "FIGURES_GRACE_S", 3600.0)
    rig = make_rig()
    outcome, _ = rig.submit(IMAGES)
    generate = rig.language[0].take("generate")
    worker, embed = rig.embed_call()
    rig.directory.ended[rig.language[0].name] = threading.Event()
    _serve(generate, 5)
    assert rig.directory.ended[rig.language[0].name].wait(WAIT_S)
    assert outcome.tokens == [5] and not outcome.over.is_set()
    if end == "figures":
        embed.end(EMBEDDED)
    elif end == "failure":
        embed.fail("EncodeFailed", "too late to matter")
    else:
        rig.lose(worker)
    stats = outcome.wait().stats
    assert stats is not None and (EMBEDDED.items() <= stats.hops.items()) == (end == "figures")


def test_rows_that_the_language_worker_no_longer_wants_cost_no_answer(make_rig: MakeRig) -> None:
    """It may know the answer's beginning from its prefix cache, and be done before the rows are: the news crosses."""
    rig = make_rig(num_language=1)
    outcome, _ = rig.submit(IMAGES)
    generate = rig.language[0].take("generate")
    worker, embed = rig.embed_call()
    rig.directory.ended[worker.name] = threading.Event()
    embed.fail("Cancelled", "the receiver no longer wants the stream")
    assert rig.directory.ended[worker.name].wait(WAIT_S)
    rig.submit()
    rig.language[0].take("generate")  # which comes behind a cancellation, had one been sent
    assert not rig.language[0].was_cancelled(generate, within_s=0)
    _serve(generate, 5)
    assert outcome.wait().stats is not None and outcome.tokens == [5]


def test_an_embed_call_that_never_ends_does_not_hold_a_complete_answer(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, _ = rig.submit(IMAGES)
    generate = rig.language[0].take("generate")
    worker, embed = rig.embed_call()
    _serve(generate, 5)
    stats = outcome.wait().stats
    assert stats is not None and "encode_ms" not in stats.hops
    assert worker.was_cancelled(embed)


def test_requests_spread_over_language_workers_and_the_same_image_returns_to_its_cache(make_rig: MakeRig) -> None:
    rig = make_rig(num_language=3)
    homes = set()
    for _ in range(3):
        rig.submit(IMAGES)
        worker, call = rig.embed_call()
        homes.add(worker.name)
        rig.directory.ended[worker.name] = threading.Event()
        call.end(EMBEDDED)
        assert rig.directory.ended[worker.name].wait(WAIT_S)  # while it counts as running, others may be chosen
    assert len(homes) == 1
    for worker in rig.language:
        worker.take("generate")
        assert not worker.has_calls()


# -- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["PeerLost", "EngineStopped", "EndpointClosed"])
def test_a_language_worker_lost_before_the_first_token_is_replaced(make_rig: MakeRig, code: str) -> None:
    rig = make_rig()
    outcome, _ = rig.submit(IMAGES)
    first = rig.language[0].take("generate")
    embedder, old_embed = rig.embed_call()
    if code == "PeerLost":
        rig.lose(rig.language[0])
    else:
        first.fail(code, "stopping")
    second = rig.language[1].take("generate")
    assert embedder.was_cancelled(old_embed), "rows for the lost worker are of no use"
    new_embedder, new_embed = rig.embed_call()
    assert new_embedder is embedder, "its cache has the images"
    assert new_embed.body["receiver"]["address"] == rig.language[1].entry.address
    tickets = [call.body["ticket"]["stream_id"] for call in (first, second, new_embed)]
    assert tickets[0] != tickets[1] == tickets[2]
    new_embed.end(EMBEDDED)
    _serve(second, 5, 6)
    send_tokens(first, 99)  # a late word of the lost worker
    stats = outcome.wait().stats
    assert outcome.tokens == [5, 6] and stats is not None and stats.hops["language_worker"] == "language-1"


@pytest.mark.parametrize("code", ["PeerLost", "EmbedStopped", "StreamTimeout"])
def test_a_request_whose_stream_is_over_with_its_embedding_worker_begins_anew(make_rig: MakeRig, code: str) -> None:
    rig = make_rig(num_language=1)
    outcome, _ = rig.submit(IMAGES)
    first = rig.language[0].take("generate")
    embedder, embed = rig.embed_call()
    if code == "PeerLost":
        rig.lose(embedder)
    else:
        embed.fail(code, "no rows")
    if code == "StreamTimeout":
        first.fail("MediaFailed", "the embedding stream failed")
    rig.language[0].take("reissue").end({"ticket": None})  # the stream is over already
    if code != "StreamTimeout":
        first.fail("MediaFailed", "the embedding stream failed")
    second = rig.language[0].take("generate")
    other, again = rig.embed_call()
    assert other is not embedder
    again.end(EMBEDDED)
    _serve(second, 5)
    assert outcome.wait().error is None and outcome.tokens == [5]


def test_a_worker_lost_after_the_first_token_is_replaced_and_no_token_comes_twice(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, _ = rig.submit()
    call = rig.language[0].take("generate")
    send_tokens(call, 5, 6)
    assert outcome.started.wait(WAIT_S)
    rig.lose(rig.language[0])
    again = rig.language[1].take("generate")
    assert again.body["sampling"] == call.body["sampling"]
    send_tokens(again, 5)
    send_tokens(again, 6, 7)
    send_tokens(call, 99)  # a late word of the lost worker
    send_tokens(again, 8, finish_reason="stop")
    end_generate(again, 4)
    stats = outcome.wait().stats
    assert stats is not None and stats.hops["attempts"] == 2 and outcome.tokens == [5, 6, 7, 8]
    assert rig.attempts == ["first", "PeerLost"]


def test_a_request_without_a_seed_gets_one_that_all_its_workers_are_told(make_rig: MakeRig) -> None:
    seeds = set()
    for _ in range(2):
        rig = make_rig()
        outcome, _ = rig.submit(sampling=replace(SAMPLING, seed=None))  # also at temperature 0: masks may be drawn
        first = rig.language[0].take("generate")
        first.fail("EngineStopped", "stopping")
        second = rig.language[1].take("generate")
        assert second.body["sampling"]["seed"] == first.body["sampling"]["seed"] is not None
        seeds.add(second.body["sampling"]["seed"])
        _serve(second, 5)
        assert outcome.wait().error is None
    assert len(seeds) == 2


def test_a_worker_that_came_back_may_take_over_from_the_one_that_took_over_from_it(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, _ = rig.submit()
    rig.language[0].take("generate").fail("EngineStopped", "stopping")
    again = rig.language[1].take("generate")
    with FakeWorker("language", "language-0") as reborn:
        rig.directory.replace([reborn.entry, rig.language[1].entry, *(worker.entry for worker in rig.embedding)])
        send_tokens(again, 5)
        assert outcome.started.wait(WAIT_S)
        again.fail("EngineStopped", "stopping, too")
        _serve(reborn.take("generate"), 5, 6)
        stats = outcome.wait().stats
    assert stats is not None and stats.hops["attempts"] == 3 and outcome.tokens == [5, 6]
    assert rig.attempts == ["first", "EngineStopped", "EngineStopped"]


def test_an_answer_that_would_be_another_one_is_an_error_and_nothing_wrong_is_delivered(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, _ = rig.submit()
    call = rig.language[0].take("generate")
    send_tokens(call, 5, 6)
    assert outcome.started.wait(WAIT_S)
    rig.lose(rig.language[0])
    again = rig.language[1].take("generate")
    send_tokens(again, 5)
    send_tokens(again, 7)
    assert rig.language[1].was_cancelled(again)
    send_tokens(again, 8)
    again.fail("Cancelled", "as it was told")
    error = outcome.wait().error
    assert isinstance(error, WorkerLost) and "would have answered otherwise" in str(error)
    assert outcome.tokens == [5, 6]


def test_the_last_worker_lost_in_its_answer_is_told_as_such(make_rig: MakeRig) -> None:
    rig = make_rig(num_language=1)
    outcome, _ = rig.submit()
    send_tokens(rig.language[0].take("generate"), 5)
    assert outcome.started.wait(WAIT_S)
    rig.directory.set_alive(rig.language[0].entry, False)
    rig.lose(rig.language[0])
    error = outcome.wait().error
    assert isinstance(error, WorkerLost) and "while it was answering, and no other could take over" in str(error)
    assert outcome.tokens == [5]


def test_an_embedding_worker_lost_once_tokens_come_does_not_matter(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, _ = rig.submit(IMAGES)
    generate = rig.language[0].take("generate")
    embedder, _ = rig.embed_call()
    rig.directory.ended[embedder.name] = threading.Event()
    send_tokens(generate, 5)
    assert outcome.started.wait(WAIT_S)
    rig.lose(embedder)
    assert rig.directory.ended[embedder.name].wait(WAIT_S)
    _serve(generate, 6, 7)
    stats = outcome.wait().stats
    assert outcome.tokens == [5, 6, 7] and stats is not None and stats.num_generated_tokens == 2


def test_attempts_are_bounded(make_rig: MakeRig) -> None:
    rig = make_rig(num_language=MAX_ATTEMPTS + 1)
    outcome, _ = rig.submit()
    for worker in rig.language[:MAX_ATTEMPTS]:
        worker.take("generate").fail("EngineStopped", "stopping")
    error = outcome.wait().error
    assert isinstance(error, WorkerLost) and "language-2 was lost and 2 others before it" in str(error)
    assert not rig.language[MAX_ATTEMPTS].has_calls()


def test_the_only_worker_s_loss_is_told_as_such(make_rig: MakeRig) -> None:
    rig = make_rig(num_language=1)
    outcome, _ = rig.submit()
    rig.language[0].take("generate").fail("EngineStopped", "stopping")
    error = outcome.wait().error
    assert isinstance(error, WorkerLost) and "no other could take over (EngineStopped)" in str(error)


def test_dead_workers_are_not_asked(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.directory.set_alive(rig.language[0].entry, False)
    outcome, _ = rig.submit()
    _serve(rig.language[1].take("generate"), 5)
    assert outcome.wait().error is None
    rig.directory.set_alive(rig.language[1].entry, False)
    with pytest.raises(NoWorker, match="none of the 2 language workers"):
        rig.submit()


def test_every_attempt_lives_under_the_one_deadline(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    monkeypatch.setattr(cluster.handoff, "time", Clock)
    rig = make_rig(num_language=3)
    outcome, _ = rig.submit(timeout_s=10)
    for left_ms, worker in ((10_000, rig.language[0]), (6_000, rig.language[1])):
        call = worker.take("generate")
        assert call.body["deadline_ms"] == left_ms
        now[0] += 4 if left_ms == 10_000 else 6
        call.fail("EngineStopped", "stopping")
    assert isinstance(outcome.wait().error, RequestTimeout)
    assert not rig.language[2].has_calls()
    with pytest.raises(RequestTimeout):
        rig.submit(timeout_s=0)


# -- links that lose messages -----------------------------------------------------------------------------------------


class Loss:
    """Takes messages of one kind away, from the `first`th to the last of the next `count`; is there while it is set."""

    def __init__(self, kind: type[Message], first: int = 0, count: int = 1) -> None:
        self.kind, self.wanted = kind, range(first, first + count)
        self.num_seen = self.num_lost = 0

    def __call__(self, source: str, target: str, message: Message, frames: Sequence[memoryview]) -> list[Parcel]:
        is_ping = getattr(message, "method", "generate") != "generate" or (
            isinstance(message, End) and not message.body
        )
        if not isinstance(message, self.kind) or is_ping:
            return [(message, frames)]
        is_lost = self.num_seen in self.wanted
        self.num_seen += 1
        self.num_lost += is_lost
        return [] if is_lost else [(message, frames)]


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loss], Loss]:
    def switch_on(loss: Loss) -> Loss:
        monkeypatch.setattr(PROCESS_NETWORK, "fault", loss)
        return loss

    return switch_on


QUICK = replace(PATIENT, ping_interval_s=0.1)


@pytest.mark.parametrize("lost", [Call, Parts, End])
@pytest.mark.parametrize("num_language", [1, 2])
def test_a_request_whose_messages_were_lost_before_the_first_token_begins_anew(
    make_rig: MakeRig, lose: Callable[[Loss], Loss], lost: type[Message], num_language: int
) -> None:
    rig = make_rig(num_language=num_language, config=QUICK)
    loss = lose(Loss(lost))
    outcome, _ = rig.submit()
    if lost is not Call:
        first = rig.language[0].take("generate")
        if lost is Parts:
            send_tokens(first, 4)
            send_tokens(first, 5)
            assert rig.language[0].was_cancelled(first), "it would work on for nobody"
        else:
            end_generate(first, 0)
    second = rig.language[-1].take("generate")  # the same one, where there is no other: only the link to it broke
    _serve(second, 6, 7)
    assert outcome.wait().error is None and outcome.tokens == [6, 7]
    assert loss.num_lost == 1


@pytest.mark.parametrize(("lost", "first"), [(Parts, 1), (Parts, 3), (End, 0)])
def test_an_answer_that_lost_a_message_after_its_first_token_goes_on_without_a_hole(
    make_rig: MakeRig, lose: Callable[[Loss], Loss], lost: type[Message], first: int
) -> None:
    rig = make_rig(config=QUICK)
    loss = lose(Loss(lost, first))
    outcome, _ = rig.submit()
    call = rig.language[0].take("generate")
    send_tokens(call, 4)
    assert outcome.started.wait(WAIT_S)
    _serve(call, 5, 6, 7)
    again = rig.language[1].take("generate")
    assert loss.num_lost == 1
    assert outcome.tokens == [4, 5, 6, 7][: first if lost is Parts else 4], "a part of the answer, without a hole"
    _serve(again, 4, 5, 6, 7)
    assert outcome.wait().error is None and outcome.tokens == [4, 5, 6, 7]


# -- blame ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generate", "embed", "reported"),
    [
        ("MediaFailed", "BadImage", "BadImage"),
        ("MediaFailed", "EncodeFailed", "EncodeFailed"),
        ("PromptTooLong", "StreamAborted", "PromptTooLong"),
        ("MediaFailed", "StreamAborted", "MediaFailed"),
        ("StreamAborted", "TicketRejected", "StreamAborted"),
        ("MediaFailed", "TicketRejected", "MediaFailed"),
    ],
)
@pytest.mark.parametrize("first", ["generate", "embed"])
def test_the_failure_that_says_most_is_reported(
    make_rig: MakeRig, generate: str, embed: str, reported: str, first: str
) -> None:
    rig = make_rig()
    outcome, _ = rig.submit(IMAGES)
    worker, embed_call = rig.embed_call()
    calls = {"generate": (rig.language[0].take("generate"), generate), "embed": (embed_call, embed)}
    rig.directory.ended = {rig.language[0].name: threading.Event(), worker.name: threading.Event()}
    call, code = calls.pop(first)
    call.fail(code, "what happened first")
    assert rig.directory.ended[rig.language[0].name if first == "generate" else worker.name].wait(WAIT_S)
    ((call, code),) = calls.values()
    call.fail(code, "what happened second")
    assert outcome.failure().code == reported
    assert not any(worker.has_calls() for worker in rig.language), "nobody was lost: no other attempt"


@pytest.mark.parametrize("first", ["generate", "embed"])
def test_a_failure_of_one_leg_cancels_the_other(make_rig: MakeRig, first: str) -> None:
    rig = make_rig()
    outcome, _ = rig.submit(IMAGES)
    generate = rig.language[0].take("generate")
    embedder, embed = rig.embed_call()
    if first == "generate":
        generate.fail("PromptTooLong", "9 tokens, at most 8")
        assert embedder.was_cancelled(embed)
    else:
        embed.fail("BadImage", "image 1: not an image")
        assert rig.language[0].was_cancelled(generate)
    failure = outcome.failure()
    assert failure.code == ("PromptTooLong" if first == "generate" else "BadImage")


def test_a_stopping_engine_is_blamed_even_when_the_embed_leg_tells_first(make_rig: MakeRig) -> None:
    """An engine that stops aborts its streams with its own code, which the embedding worker passes on."""
    rig = make_rig()
    outcome, _ = rig.submit(IMAGES)
    rig.language[0].take("generate")
    embedder, embed = rig.embed_call()
    embed.fail("EngineStopped", "the worker is closing")
    second = rig.language[1].take("generate")
    again, new_embed = rig.embed_call()
    assert again is embedder, "the embedding worker did nothing wrong"
    new_embed.end(EMBEDDED)
    _serve(second, 5)
    assert outcome.wait().tokens == [5]


# -- cancels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("media", [(), IMAGES], ids=["text", "media"])
@pytest.mark.parametrize("moment", ["at once", "taken", "first token", "within a chunk"])
def test_cancel(make_rig: MakeRig, moment: str, media: tuple[bytes, ...]) -> None:
    rig = make_rig()
    outcome, running = rig.submit(media)
    if moment == "at once":
        running.cancel()
    generate = rig.language[0].take("generate")
    embed = rig.embed_call() if media else None
    if moment == "taken":
        running.cancel()
    elif moment == "first token":
        send_tokens(generate, 5)
        assert outcome.started.wait(WAIT_S)
        running.cancel()
    elif moment == "within a chunk":
        outcome.during_chunk = running.cancel
        send_tokens(generate, 5)
    running.cancel()
    assert outcome.failure().code == "Cancelled"
    assert rig.language[0].was_cancelled(generate)
    if embed is not None:
        assert embed[0].was_cancelled(embed[1])
    assert rig.loads() == {0}
    running.cancel()
    assert not rig.language[1].has_calls()


def test_cancel_after_the_end_does_nothing(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, running = rig.submit()
    _serve(rig.language[0].take("generate"), 5)
    assert outcome.wait().error is None
    running.cancel()
    assert outcome.error is None


@pytest.mark.parametrize("attempt", [1, 2])
def test_cancel_while_the_calls_are_being_made(make_rig: MakeRig, attempt: int) -> None:
    """The leg that is made after the cancel is cancelled too, in the first attempt and in a later one."""
    rig = make_rig()
    runs: list[RunningRequest] = []

    class Cancels(Handoff):
        """Hands out the running request before its calls are made, as another thread might have it."""

        def submit(self, request: ServedRequest, sink: Any) -> RunningRequest:
            run = self._new_run(request, sink)
            runs.append(run)
            run.start()
            return run

    rig.handoff = Cancels(rig.service, rig.directory)
    num_embeds = 0

    def before(worker: WorkerAddress) -> None:
        nonlocal num_embeds
        if worker.kind == "embedding":
            num_embeds += 1
            if num_embeds == attempt:
                runs[0].cancel()

    rig.directory.before_connection = before
    outcome, _ = rig.submit(IMAGES)
    if attempt == 2:
        rig.language[0].take("generate").fail("EngineStopped", "stopping")
    assert outcome.failure().code == "Cancelled"
    assert num_embeds == attempt
    assert rig.loads() == {0}


def test_a_leg_made_after_the_other_failed_is_cancelled(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.directory.ended["language-0"] = threading.Event()

    def before(worker: WorkerAddress) -> None:
        if worker.kind == "embedding":
            rig.language[0].take("generate").fail("PromptTooLong", "9 tokens, at most 8")
            assert rig.directory.ended["language-0"].wait(WAIT_S)

    rig.directory.before_connection = before
    outcome, _ = rig.submit(IMAGES)
    assert outcome.failure().code == "PromptTooLong"
    embedder, embed = rig.embed_call()
    assert embedder.was_cancelled(embed)


def test_a_worker_lost_while_the_request_is_cancelled_is_not_replaced(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, running = rig.submit()
    rig.language[0].take("generate")
    hold, held = threading.Event(), threading.Event()

    def block() -> None:
        held.set()
        assert hold.wait(WAIT_S)

    rig.service.post(block)  # the I/O thread stands: what follows waits in this order
    assert held.wait(WAIT_S)
    rig.lose(rig.language[0])
    running.cancel()
    hold.set()
    assert outcome.failure().code == "Cancelled"
    assert not rig.language[1].has_calls()


# -- what cannot be called --------------------------------------------------------------------------------------------


def _refuse(kind: str) -> Callable[[WorkerAddress], None]:
    def before(worker: WorkerAddress) -> None:
        if worker.kind == kind:
            raise ConfigError(f"{worker.address} is connected with another public key")

    return before


def test_a_leg_that_cannot_be_made_takes_the_other_back(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.directory.before_connection = _refuse("embedding")
    with pytest.raises(ConfigError, match="another public key"):
        rig.submit(IMAGES)
    call = rig.language[0].take("generate")
    assert rig.language[0].was_cancelled(call)


def test_a_retry_that_cannot_be_made_ends_the_request(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, _ = rig.submit()
    call = rig.language[0].take("generate")
    rig.directory.before_connection = _refuse("language")
    call.fail("EngineStopped", "stopping")
    assert isinstance(outcome.wait().error, ConfigError)
    assert rig.loads() == {0}


def test_a_worker_that_went_between_choice_and_call(make_rig: MakeRig) -> None:
    rig = make_rig(num_language=1)
    views = rig.directory.views()
    rig.directory.replace([])
    rig.directory.views = lambda: views  # type: ignore[method-assign]
    with pytest.raises(NoWorker, match="replaced a moment ago"):
        rig.submit()


def test_closing_the_service_ends_what_runs_and_refuses_more(make_rig: MakeRig) -> None:
    rig = make_rig()
    outcome, _ = rig.submit(IMAGES)
    rig.language[0].take("generate")
    rig.service.close()
    assert isinstance(outcome.wait().error, (EndpointClosed, WorkerLost))
    with pytest.raises(EndpointClosed):
        rig.submit()
