"""Another sender goes on with a request's media at the worker: what was computed stays, or all is computed anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker.worker import LanguageWorker
from tests.language_worker.helpers import GREEDY, Media, drive, make_engine, request
from tests.language_worker.test_worker import ENGINE, NAMES, PAD, PATIENT, WAIT_S, Answer, Client
from tests.waiting import eventually
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import TransferError
from transfer.memory.buffers import plane_of
from transfer.protocol.ticket import Ticket

ROWS, BLOCK = 100, 16
IDS = (1, 2, PAD, 3)
NUM_PROMPT = len(IDS) - 1 + ROWS
NUM_COMPUTED = NUM_PROMPT + (GREEDY.max_tokens or 0) - 1


class Rig:
    """A worker that computes every row as it comes, and two clients of it."""

    def __init__(self, folder: Path) -> None:
        transfer = TransferConfig(block_size=BLOCK, default_allocate_tokens=BLOCK, pool_tokens=64, **PATIENT)
        config = dataclasses.replace(ENGINE, min_partial_chunk=1)
        self.worker = LanguageWorker(folder, config, transfer, open_endpoint(f"inproc://worker-{next(NAMES)}"))
        self.worker.start()
        self.first, self.second = Client(self.worker, transfer), Client(self.worker, transfer)

    def close(self) -> None:
        self.first.service.close()
        self.second.service.close()
        self.worker.close()

    def open(self, client: Client, ticket: Ticket, media: Media, key: str) -> Any:
        stream = client.sender.open(ticket, self.worker.address, None, (plane_of("embeddings", media.rows),), key)
        stream.announce(media.rows.shape[0], media.items())
        return stream

    def reissue(self, request_id: str = "a") -> Ticket | None:
        answer = self.call_reissue({"request_id": request_id})
        assert answer.body is not None, answer.failure
        return None if answer.body["ticket"] is None else Ticket.from_body(answer.body["ticket"])

    def call_reissue(self, body: dict[str, Any]) -> Answer:
        answer = Answer()
        self.second.service.call(self.second.connection, "reissue", body, on_end=answer.on_end)
        return answer.wait()

    def await_computed(self, num_tokens: int) -> None:
        eventually(
            lambda: self.worker.stats()["computed_tokens_total"] >= num_tokens,
            lambda: f"{self.worker.stats()} instead of {num_tokens} computed tokens",
        )


@pytest.fixture
def rig(tiny: Path) -> Iterator[Rig]:
    made = Rig(tiny)
    yield made
    made.close()


def _media(seed: int) -> Media:
    rows = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(seed))
    return Media(grids=[(1, 2, 2 * ROWS)], rows=rows)


@pytest.mark.parametrize("num_blocks", [0, 1, 3, 6])
@pytest.mark.parametrize("is_same", [True, False], ids=["same key", "other key"])
def test_the_answer_is_right_and_only_a_new_content_is_computed_anew(
    rig: Rig, tiny: Path, num_blocks: int, is_same: bool
) -> None:
    media = _media(1)
    old = media if is_same else _media(2)
    expected = drive(make_engine(tiny), [request("a", IDS, num_media=1)], {"a": media})["a"]
    ticket = Ticket.issue("a")
    answer, _ = rig.first.generate(request_id="a", prompt_token_ids=list(IDS), num_media=1, ticket=ticket.to_body())
    first = rig.open(rig.first, ticket, old, "content")
    num_rows = num_blocks * BLOCK
    first.write(0, {"embeddings": old.rows[: num_rows + 3].clone()})
    rig.await_computed(2 + num_rows)
    again = rig.reissue()
    assert again is not None and again.epoch == 2 and again.stream_id == ticket.stream_id
    second = rig.open(rig.second, again, media, "content" if is_same else "other content")
    assert second.wait_accepted(WAIT_S) == (num_rows if is_same else 0)
    second.write(second.first_row, {"embeddings": media.rows[second.first_row :].clone()})
    answer.wait()
    assert answer.failure is None and answer.tokens == expected.tokens()
    stats = rig.worker.stats()
    assert stats["computed_tokens_total"] == NUM_COMPUTED + (0 if is_same else 2 + num_rows)
    assert stats["prompt_tokens_total"] == NUM_PROMPT
    assert stats["embed_takeovers_total"] == 1
    with pytest.raises(TransferError):
        first.result(WAIT_S)
    rig.first.await_empty()


def test_a_content_of_another_size_takes_the_place_of_the_old_one(rig: Rig, tiny: Path) -> None:
    """The request has begun on 100 rows; the next sender has 30."""
    ids, media = (1, 2, PAD, 3), Media(grids=[(1, 2, 60)], rows=torch.randn(30, 64))
    expected = drive(make_engine(tiny), [request("a", ids, num_media=1)], {"a": media})["a"]
    ticket = Ticket.issue("a")
    answer, _ = rig.first.generate(request_id="a", prompt_token_ids=list(ids), num_media=1, ticket=ticket.to_body())
    rig.open(rig.first, ticket, _media(1), "content").write(0, {"embeddings": _media(1).rows[:50]})
    rig.await_computed(2 + 48)
    again = rig.reissue()
    assert again is not None
    rig.open(rig.second, again, media, "other").write(0, {"embeddings": media.rows})
    assert answer.wait().tokens == expected.tokens()
    assert answer.body is not None and answer.body["num_prompt_tokens"] == 33
    rig.first.await_empty()


def test_a_sender_that_says_it_stops_is_waited_for_and_a_second_loss_is_too(rig: Rig, tiny: Path) -> None:
    media = _media(3)
    expected = drive(make_engine(tiny), [request("a", IDS, num_media=1)], {"a": media})["a"]
    ticket: Ticket | None = Ticket.issue("a")
    assert ticket is not None
    answer, _ = rig.first.generate(request_id="a", prompt_token_ids=list(IDS), num_media=1, ticket=ticket.to_body())
    for num_blocks in (1, 2):
        assert ticket is not None
        stream = rig.open(rig.first, ticket, media, "content")
        first_row = stream.wait_accepted(WAIT_S)
        stream.write(first_row, {"embeddings": media.rows[first_row : num_blocks * BLOCK].clone()})
        rig.await_computed(2 + num_blocks * BLOCK)
        stream.abort("EmbedStopped", "the worker is closing")
        ticket = rig.reissue()
    assert ticket is not None
    rig.open(rig.second, ticket, media, "content").write(0, {"embeddings": media.rows})
    assert answer.wait().tokens == expected.tokens()
    assert rig.worker.stats()["computed_tokens_total"] == NUM_COMPUTED


def test_no_ticket_for_what_needs_none(rig: Rig) -> None:
    assert rig.reissue("nobody") is None
    answer, _ = rig.first.generate(request_id="text", prompt_token_ids=[1, 2])
    assert rig.reissue("text") is None
    assert answer.wait().failure is None
    for body in ({}, {"request_id": 5}, {"request_id": "a", "more": 1}):
        refused = rig.call_reissue(body).failure
        assert refused is not None and refused.code == "InvalidRequest"
    assert rig.worker.stats()["embed_takeovers_total"] == 0


def test_a_request_that_ends_while_it_waits_for_a_sender_leaves_nothing(rig: Rig) -> None:
    ticket = Ticket.issue("a")
    answer, call = rig.first.generate(request_id="a", prompt_token_ids=list(IDS), num_media=1, ticket=ticket.to_body())
    rig.open(rig.first, ticket, _media(1), "content").write(0, {"embeddings": _media(1).rows[:40]})
    rig.await_computed(2 + 32)
    again = rig.reissue()
    assert again is not None
    call.cancel()
    assert answer.wait().failure is not None
    late = rig.open(rig.second, again, _media(1), "content")
    with pytest.raises(TransferError):
        late.result(WAIT_S)
    rig.first.await_empty()
