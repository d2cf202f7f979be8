"""An embedding worker is lost while its request is under way: another one goes on with the same stream, or all fails.

As in `test_handoff`, workers do exactly what a test says; nothing waits for time to pass.
"""

from __future__ import annotations

import threading

import pytest

import cluster.attempt
from cluster.attempt import MAX_EMBED_TRIES
from cluster.errors import WorkerLost
from tests.cluster.fake_workers import FakeWorker, send_tokens
from tests.cluster.test_handoff import EMBEDDED, IMAGES, WAIT_S, MakeRig, Outcome, Rig, _serve, make_rig
from transfer.protocol.ticket import Ticket
from transfer.service.calls import IncomingCall

__all__ = ["make_rig"]  # the fixture


class Begun:
    """A request with images of which both calls have been taken."""

    def __init__(self, rig: Rig, **values: float) -> None:
        self.rig = rig
        self.outcome: Outcome
        self.outcome, self.running = rig.submit(IMAGES, **values)
        self.generate = rig.language[0].take("generate")
        self.embedder, self.embed = rig.embed_call()
        self.ticket = Ticket.from_body(self.embed.body["ticket"])

    def lose(self, code: str = "PeerLost") -> None:
        if code == "PeerLost":
            self.rig.lose(self.embedder)
        else:
            self.embed.fail(code, "no more rows")

    def reissue(self) -> IncomingCall:
        """The question for a ticket, taken."""
        call = self.rig.language[0].take("reissue")
        assert call.body == {"request_id": self.generate.body["request_id"]}
        return call

    def take_over(self) -> FakeWorker:
        """The question is answered; the next embedding worker has its call."""
        self.ticket = self.ticket.next_epoch()
        before = self.embedder
        self.reissue().end({"ticket": self.ticket.to_body()})
        self.embedder, self.embed = self.rig.embed_call()
        assert self.embedder is not before
        return self.embedder


@pytest.mark.parametrize("code", ["PeerLost", "EmbedStopped", "StreamTimeout", "EndpointClosed"])
def test_another_embedding_worker_goes_on_with_the_same_stream(make_rig: MakeRig, code: str) -> None:
    begun = Begun(make_rig(num_language=2), timeout_s=60.0)
    first = begun.embed
    begun.lose(code)
    worker = begun.take_over()
    body = begun.embed.body
    assert Ticket.from_body(body["ticket"]) == begun.ticket and begun.ticket.epoch == 2
    assert [bytes(frame) for frame in begun.embed.frames] == list(IMAGES)
    assert {**body, "ticket": 0, "deadline_ms": 0} == {**first.body, "ticket": 0, "deadline_ms": 0}
    assert len(body["media_key"]) == 32 and 0 < body["deadline_ms"] <= first.body["deadline_ms"]
    begun.embed.end(EMBEDDED)
    _serve(begun.generate, 5, 6)
    stats = begun.outcome.wait().stats
    assert begun.outcome.tokens == [5, 6] and stats is not None
    assert EMBEDDED.items() <= stats.hops.items()
    assert stats.hops["embedding_worker"] == worker.name and stats.hops["embed_takeovers"] == 1
    assert not any(language.has_calls() for language in begun.rig.language), "the attempt is the same"


def test_equal_media_have_equal_keys_and_others_have_not(make_rig: MakeRig) -> None:
    rig = make_rig()
    keys = []
    for media in (IMAGES, IMAGES, IMAGES[:1], (b"first imag", b"esecond image"), (b"first imagesecond image",)):
        rig.submit(media)
        keys.append(rig.embed_call()[1].body["media_key"])
    assert keys[0] == keys[1] and len(set(keys)) == 4


def test_tries_are_bounded(make_rig: MakeRig) -> None:
    begun = Begun(make_rig(num_language=1, num_embedding=MAX_EMBED_TRIES + 1))
    for _ in range(MAX_EMBED_TRIES - 1):
        begun.lose("EmbedStopped")
        begun.take_over()
    begun.lose("EmbedStopped")
    assert begun.rig.language[0].was_cancelled(begun.generate)
    again = begun.rig.language[0].take("generate")  # the last resort is a new attempt
    _, embed = begun.rig.embed_call()
    assert Ticket.from_body(embed.body["ticket"]).stream_id != begun.ticket.stream_id
    embed.end(EMBEDDED)
    _serve(again, 5)
    assert begun.outcome.wait().tokens == [5]


def test_without_another_embedding_worker_the_request_fails_at_once(make_rig: MakeRig) -> None:
    begun = Begun(make_rig(num_language=1, num_embedding=1))
    begun.lose()
    assert begun.rig.language[0].was_cancelled(begun.generate)
    assert isinstance(begun.outcome.wait().error, WorkerLost)
    assert not begun.rig.language[0].has_calls()


def test_no_ticket_is_asked_for_when_the_media_are_at_fault(make_rig: MakeRig) -> None:
    begun = Begun(make_rig(num_language=1))
    begun.lose("BadImage")
    assert begun.outcome.failure().code == "BadImage"
    assert begun.rig.language[0].was_cancelled(begun.generate) and not begun.rig.language[0].has_calls()


def test_no_ticket_is_asked_for_beyond_the_deadline(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])
        perf_counter = staticmethod(lambda: now[0])

    monkeypatch.setattr(cluster.attempt, "time", Clock)
    begun = Begun(make_rig(num_language=1), timeout_s=10.0)
    now[0] = 10.5
    begun.lose("EmbedStopped")
    assert begun.rig.language[0].was_cancelled(begun.generate)


def test_rows_that_are_all_there_need_no_other_worker(make_rig: MakeRig) -> None:
    """The language worker has no ticket to give, and the answer comes."""
    begun = Begun(make_rig(num_language=1))
    begun.lose()
    begun.reissue().end({"ticket": None})
    _serve(begun.generate, 5, 6)
    stats = begun.outcome.wait().stats
    assert begun.outcome.tokens == [5, 6] and stats is not None and "encode_ms" not in stats.hops
    assert not any(worker.has_calls() for worker in begun.rig.embedding)


def test_a_language_worker_that_is_lost_too_costs_the_attempt(make_rig: MakeRig) -> None:
    begun = Begun(make_rig(num_language=2))
    begun.lose()
    begun.reissue()
    begun.rig.lose(begun.rig.language[0])
    again = begun.rig.language[1].take("generate")
    embedder, embed = begun.rig.embed_call()
    assert embedder is not begun.embedder, "the worker that was lost first is not asked again"
    embed.end(EMBEDDED)
    _serve(again, 5)
    assert begun.outcome.wait().tokens == [5]


def test_a_language_worker_that_knows_no_take_over_costs_the_attempt(make_rig: MakeRig) -> None:
    begun = Begun(make_rig(num_language=1))
    begun.lose()
    begun.reissue().fail("UnknownMethod", "there is no method 'reissue' here")
    assert begun.rig.language[0].was_cancelled(begun.generate)
    begun.rig.embed_call()[1].end(EMBEDDED)
    _serve(begun.rig.language[0].take("generate"), 5)
    assert begun.outcome.wait().tokens == [5]


@pytest.mark.parametrize("moment", ["asked", "begun"])
def test_a_cancel_reaches_the_worker_that_takes_over(make_rig: MakeRig, moment: str) -> None:
    begun = Begun(make_rig(num_language=1))
    begun.lose()
    if moment == "asked":
        call = begun.reissue()
        begun.running.cancel()
        assert begun.rig.language[0].was_cancelled(call)
    else:
        worker = begun.take_over()
        begun.running.cancel()
        assert worker.was_cancelled(begun.embed)
    assert begun.outcome.failure().code == "Cancelled"
    assert begun.rig.language[0].was_cancelled(begun.generate)
    assert begun.rig.loads() == {0}


def test_a_failure_of_the_answer_while_a_ticket_is_awaited_is_the_one_that_is_told(make_rig: MakeRig) -> None:
    begun = Begun(make_rig(num_language=1))
    begun.lose()
    call = begun.reissue()
    begun.generate.fail("PromptTooLong", "9 tokens, at most 8")
    assert begun.rig.language[0].was_cancelled(call)
    assert begun.outcome.failure().code == "PromptTooLong"


def test_a_worker_that_went_while_the_ticket_came_costs_the_attempt(make_rig: MakeRig) -> None:
    rig = make_rig(num_language=1, num_embedding=3)
    begun = Begun(rig)
    begun.lose()
    call = begun.reissue()
    rig.directory.replace([rig.language[0].entry, *(w.entry for w in rig.embedding if w is begun.embedder)])
    call.end({"ticket": begun.ticket.next_epoch().to_body()})
    assert rig.language[0].was_cancelled(begun.generate)
    assert isinstance(begun.outcome.wait().error, WorkerLost)


def test_tokens_end_the_need_for_an_embedding_worker(make_rig: MakeRig) -> None:
    begun = Begun(make_rig(num_language=1))
    begun.rig.directory.ended[begun.embedder.name] = threading.Event()
    send_tokens(begun.generate, 5)
    assert begun.outcome.started.wait(WAIT_S)
    begun.lose()
    assert begun.rig.directory.ended[begun.embedder.name].wait(WAIT_S)
    _serve(begun.generate, 6)
    assert begun.outcome.wait().tokens == [5, 6]
    assert not begun.rig.language[0].has_calls()
