"""One request's path where prompts and answers are computed by different workers: three legs, who is told what, whom a
failure is blamed on, and what is tried again. The workers are fakes that do exactly what a test says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cluster.directory import WorkerDirectory
from cluster.handoff import Handoff
from cluster.served import RunningRequest, ServedRequest
from language_worker.api import TokenLogprob
from language_worker.diffusion_params import DiffusionParams
from language_worker.sampling_params import SamplingParams
from tests.cluster.fake_workers import PATIENT, WAIT_S, FakeWorker, Names, end_generate, send_tokens
from tests.e2e.front import Gathered
from tests.waiting import eventually
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import RemoteFailure
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service

PREFILLED = {"prefill_ms": 1.0, "prefill_preemptions": 0, "kv_blocks": 1, "kv_bytes": 64, "kv_grant_rounds": 1}
EMBEDDED = {"encode_ms": 1.5, "rows": 4, "blocks": 1, "bytes": 64, "grant_rounds": 1}
SAMPLING = SamplingParams(max_tokens=3, temperature=0.0, seed=7)


class Rig:
    """A front; one embedding worker and two of each other kind, all fakes."""

    def __init__(self, num: int) -> None:
        self.embedding = FakeWorker("embedding", "embedding-0")
        self.prefill = [FakeWorker("prefill", f"prefill-{i}") for i in range(num)]
        self.decode = [FakeWorker("decode", f"decode-{i}") for i in range(num)]
        self.workers = [self.embedding, *self.prefill, *self.decode]
        self.service = Service(open_endpoint(f"inproc://{Names.fresh('front')}"), PATIENT)
        self.service.start()
        self.directory = WorkerDirectory(self.service)
        self.directory.replace([worker.entry for worker in self.workers])
        self.handoff = Handoff(self.service, self.directory)

    def submit(self, *media: bytes, **values: Any) -> tuple[Gathered, RunningRequest]:
        sink = Gathered()
        request = ServedRequest(
            request_id=Names.fresh("request"),
            prompt_token_ids=(1, 2, 3),
            media=media,
            **{"sampling": SAMPLING, **values},
        )
        return sink, self.handoff.submit(request, sink)

    def lose(self, worker: FakeWorker) -> None:
        self.service.drop_peer(self.directory.connection(worker.entry), "no sign of life")

    def close(self) -> None:
        self.service.close()
        for worker in self.workers:
            worker.close()


@pytest.fixture(params=[2])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.close()


def _failure(sink: Gathered) -> RemoteFailure:
    assert sink.over.wait(WAIT_S)
    assert isinstance(sink.error, RemoteFailure), sink.error
    return sink.error


def test_three_legs_and_their_tickets(rig: Rig) -> None:
    sink, _ = rig.submit(b"image")
    generate, prefill = rig.decode[0].take("generate"), rig.prefill[0].take("prefill")
    embed = rig.embedding.take("embed")
    assert generate.body["ticket"] is None and generate.body["kv_ticket"] == prefill.body["kv_ticket"]
    assert prefill.body["ticket"] == embed.body["ticket"] != prefill.body["kv_ticket"]
    assert prefill.body["receiver"]["address"] == rig.decode[0].entry.address
    assert embed.body["receiver"]["address"] == rig.prefill[0].entry.address
    assert generate.body["sampling"] == SAMPLING.to_body()
    needed = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    assert prefill.body["sampling"] == needed.to_body(), "no more than the prompt needs"
    embed.end(EMBEDDED)
    prefill.end(PREFILLED)
    send_tokens(generate, 5, 6, finish_reason="stop")
    end_generate(generate, 2)
    stats = sink.finish()
    assert sink.tokens() == [5, 6]
    assert (stats.hops["prefill_worker"], stats.hops["kv_bytes"], stats.hops["rows"]) == ("prefill-0", 64, 4)
    assert {view.num_running for view in rig.directory.views()} == {0}


def test_who_computes_a_prompt_before_masks_is_told_of_them(rig: Rig) -> None:
    diffusion = DiffusionParams(kv_policy="prefix", canvas="block", block_length=2, cfg_scale=1.5)
    sink, _ = rig.submit(sampling=replace(SAMPLING, n=2, diffusion=diffusion))
    generate, prefill = rig.decode[0].take("generate"), rig.prefill[0].take("prefill")
    told = SamplingParams.from_body(prefill.body["sampling"])
    assert (told.n, told.max_tokens, told.diffusion) == (1, SAMPLING.max_tokens, diffusion)
    prefill.end({**PREFILLED, "prefill_forwards": 1, "prefill_forwarded_tokens": 10})
    send_tokens(generate, 5, finish_reason="stop")
    send_tokens(generate, 5, finish_reason="stop", index=1)
    end_generate(generate, 2)
    assert sink.finish().hops["prefill_forwarded_tokens"] == 10


def test_the_answer_waits_for_what_the_prompt_says(rig: Rig) -> None:
    """Log-probabilities of the prompt come from who computes it, with the first part of the answer."""
    wanted = replace(SAMPLING, prompt_logprobs=1)
    sink, _ = rig.submit(sampling=wanted)
    generate, prefill = rig.decode[0].take("generate"), rig.prefill[0].take("prefill")
    assert generate.body["sampling"]["prompt_logprobs"] is None
    assert prefill.body["sampling"]["prompt_logprobs"] == 1
    send_tokens(generate, 5)
    send_tokens(generate, 6, finish_reason="stop")
    end_generate(generate, 2)
    entry = TokenLogprob(token_id=2, logprob=-0.5, rank=1)
    prefill.reply({"prompt_logprobs_slice": [None]})
    prefill.reply({"prompt_logprobs_slice": [entry.to_body()]})
    assert not sink.first_chunk.is_set()
    prefill.end(PREFILLED)
    sink.finish()
    assert [chunk.prompt_logprobs for chunk in sink.chunks] == [(None, entry), None]
    assert sink.tokens() == [5, 6]


def test_an_answer_without_what_the_prompt_says_is_tried_again(rig: Rig) -> None:
    sink, _ = rig.submit(sampling=replace(SAMPLING, prompt_logprobs=0))
    generate = rig.decode[0].take("generate")
    rig.prefill[0].take("prefill")
    send_tokens(generate, 5, finish_reason="stop")
    end_generate(generate)
    rig.lose(rig.prefill[0])
    generate, prefill = rig.decode[0].take("generate"), rig.prefill[1].take("prefill")
    prefill.reply({"prompt_logprobs_slice": [None]})
    prefill.end(PREFILLED)
    send_tokens(generate, 5, finish_reason="stop")
    end_generate(generate)
    sink.finish()
    assert sink.tokens() == [5], "each token once"


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_lost_worker_costs_the_attempt_and_another_takes_the_request(rig: Rig, victim: str) -> None:
    sink, _ = rig.submit()
    generate, prefill = rig.decode[0].take("generate"), rig.prefill[0].take("prefill")
    is_prefill = victim == "prefill"
    other = (rig.decode[0], generate) if is_prefill else (rig.prefill[0], prefill)
    rig.lose(rig.prefill[0] if is_prefill else rig.decode[0])
    assert other[0].was_cancelled(other[1]), "the other leg is told"
    other[1].fail("Cancelled", "as told")
    again = {"prefill": rig.prefill, "decode": rig.decode}
    took = {kind: workers[1 if kind == victim else 0] for kind, workers in again.items()}
    second, third = took["decode"].take("generate"), took["prefill"].take("prefill")
    assert second.body["kv_ticket"] == third.body["kv_ticket"] != generate.body["kv_ticket"], "a stream of its own"
    third.end(PREFILLED)
    send_tokens(second, 7, finish_reason="stop")
    end_generate(second)
    sink.finish()
    assert sink.tokens() == [7]


def test_a_prefill_worker_that_dies_behind_its_kv_hinders_nobody(rig: Rig) -> None:
    sink, _ = rig.submit()
    generate = rig.decode[0].take("generate")
    rig.prefill[0].take("prefill")
    send_tokens(generate, 5)
    assert sink.first_chunk.wait(WAIT_S)
    rig.lose(rig.prefill[0])
    send_tokens(generate, 6, finish_reason="stop")
    end_generate(generate, 2)
    sink.finish()
    assert sink.tokens() == [5, 6]


def test_a_decode_worker_lost_in_its_answer_is_replaced_and_the_answer_goes_on(rig: Rig) -> None:
    sink, _ = rig.submit()
    generate, prefill = rig.decode[0].take("generate"), rig.prefill[0].take("prefill")
    prefill.end(PREFILLED)
    send_tokens(generate, 5)
    assert sink.first_chunk.wait(WAIT_S)
    rig.lose(rig.decode[0])
    again = rig.decode[1].take("generate")
    rig.prefill[0].take("prefill").end(PREFILLED)
    send_tokens(again, 5, 6, finish_reason="stop")
    end_generate(again, 2)
    assert sink.finish().hops["attempts"] == 2 and sink.tokens() == [5, 6]


def test_both_legs_end_at_once_when_the_service_closes_and_the_request_ends_once(rig: Rig) -> None:
    sink, _ = rig.submit()
    rig.decode[0].take("generate")
    rig.service.close()
    assert sink.over.wait(WAIT_S) and sink.error is not None


@pytest.mark.parametrize("rig", [1], indirect=True)
def test_a_broken_link_between_two_that_live_is_tried_again_with_them(rig: Rig) -> None:
    sink, _ = rig.submit()
    rig.decode[0].take("generate").fail("KVStreamFailed", "no sign of life")
    rig.prefill[0].take("prefill").fail("KVStreamFailed", "no sign of life")
    generate = rig.decode[0].take("generate")
    rig.prefill[0].take("prefill").end(PREFILLED)
    send_tokens(generate, 5, finish_reason="stop")
    end_generate(generate)
    sink.finish()


def test_who_knows_the_cause_is_told_of(rig: Rig) -> None:
    """Streams break one after the other; what the client hears is why."""
    sink, _ = rig.submit(b"image")
    rig.decode[0].take("generate").fail("KVStreamFailed", "the KV stream failed")
    rig.prefill[0].take("prefill").fail("MediaFailed", "the embedding stream failed")
    rig.embedding.take("embed").fail("BadImage", "it is no image")
    assert _failure(sink).code == "BadImage"


def test_the_rows_of_media_are_taken_over_at_the_prefill_worker() -> None:
    rig = Rig(1)
    second = FakeWorker("embedding", "embedding-1")
    rig.workers.append(second)
    rig.directory.replace([worker.entry for worker in rig.workers])
    try:
        sink, _ = rig.submit(b"image")
        generate, prefill = rig.decode[0].take("generate"), rig.prefill[0].take("prefill")
        eventually(lambda: rig.embedding.has_calls() or second.has_calls(), "nobody was asked for the image")
        first, other = (rig.embedding, second) if rig.embedding.has_calls() else (second, rig.embedding)
        rig.lose(first)
        ticket = Ticket.from_body(prefill.body["ticket"]).next_epoch()
        rig.prefill[0].take("reissue").end({"ticket": ticket.to_body()})
        embed = other.take("embed")
        assert embed.body["receiver"]["address"] == rig.prefill[0].entry.address
        embed.end(EMBEDDED)
        prefill.end(PREFILLED)
        send_tokens(generate, 5, finish_reason="stop")
        end_generate(generate)
        assert sink.finish().hops["embed_takeovers"] == 1
    finally:
        rig.close()


def test_a_cancel_reaches_every_leg(rig: Rig) -> None:
    sink, running = rig.submit()
    calls = (rig.decode[0], rig.decode[0].take("generate")), (rig.prefill[0], rig.prefill[0].take("prefill"))
    running.cancel()
    for worker, call in calls:
        assert worker.was_cancelled(call)
    assert _failure(sink).code == "Cancelled"
