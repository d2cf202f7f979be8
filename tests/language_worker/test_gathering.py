"""Tokens that leave several at a time: nothing lost, changed, reordered or held back at the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_worker.api import GenerateRequest, TokenChunk, TokenLogprob
from language_worker.errors import InvalidRequest
from language_worker.gathering import Gathering


def _chunk(index: int, first: int, count: int, *, has_logprobs: bool, has_mask: bool, is_last: bool) -> TokenChunk:
    ids = tuple(range(first, first + count))
    return TokenChunk(
        request_id="r",
        index=index,
        token_ids=ids,
        text="".join(f"<{i}>" for i in ids),
        finish_reason="stop" if is_last else None,
        logprobs=tuple(TokenLogprob(token_id=i, logprob=-1.0, rank=1) for i in ids) if has_logprobs else None,
        mask=tuple(i % 2 for i in ids) if has_mask else None,
        num_prompt_tokens=3,
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), tokens_per_part=st.integers(1, 7), has_logprobs=st.booleans())
def test_the_parts_hold_what_the_chunks_held(data: st.DataObject, tokens_per_part: int, has_logprobs: bool) -> None:
    chunks: list[TokenChunk] = []
    written = [0, 0, 0]
    for index, count in data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=30)):
        if chunks and any(c.index == index and c.finish_reason for c in chunks):
            continue
        last, mask = data.draw(st.integers(0, 9)) == 0, data.draw(st.booleans())
        chunks.append(_chunk(index, written[index], count, has_logprobs=has_logprobs, has_mask=mask, is_last=last))
        written[index] += count
    gathering = Gathering(tokens_per_part)
    parts: list[TokenChunk] = []
    for chunk in chunks:
        due = gathering.add(chunk)
        parts += due
        mine = [part for part in parts if part.index == chunk.index]
        if chunk.finish_reason or len([c for c in chunks if c.index == chunk.index and c is not chunk]) == 0:
            assert mine[-1].token_ids[-len(chunk.token_ids) :] == chunk.token_ids or not chunk.token_ids
        assert all(len(part.token_ids) < tokens_per_part + 3 or tokens_per_part == 1 for part in due)
    parts += gathering.rest()
    assert gathering.rest() == []
    for index in range(3):
        mine, given_ = [p for p in parts if p.index == index], [c for c in chunks if c.index == index]
        ids = tuple(i for c in given_ for i in c.token_ids)
        assert tuple(i for p in mine for i in p.token_ids) == ids
        assert "".join(p.text for p in mine) == "".join(c.text for c in given_)
        assert [p.finish_reason for p in mine if p.finish_reason] == [
            c.finish_reason for c in given_ if c.finish_reason
        ]
        masks = [1 if c.mask is None else c.mask[n] for c in given_ for n in range(len(c.token_ids))]
        assert [1 if p.mask is None else p.mask[n] for p in mine for n in range(len(p.token_ids))] == masks
        if has_logprobs:
            assert tuple(entry.token_id for p in mine for entry in p.logprobs or ()) == ids


def test_the_first_token_leaves_at_once_and_so_does_the_end() -> None:
    gathering = Gathering(4)
    first = _chunk(0, 0, 1, has_logprobs=False, has_mask=False, is_last=False)
    assert gathering.add(first) == [first]
    second = replace(first, token_ids=(1,), text="<1>")
    assert gathering.add(second) == []
    other = replace(first, index=1)
    assert gathering.add(other) == [other], "of every sample"
    (end,) = gathering.add(replace(first, token_ids=(2,), text="<2>", finish_reason="length"))
    assert (end.token_ids, end.text, end.finish_reason) == ((1, 2), "<1><2>", "length")


def test_a_block_that_is_shown_first_does_not_hold_the_first_tokens_back() -> None:
    gathering = Gathering(16)
    first = _chunk(0, 0, 1, has_logprobs=False, has_mask=False, is_last=False)
    shown = replace(first, token_ids=(), text="", preview=(None, 4))
    assert gathering.add(shown) == [shown] and gathering.add(first) == [first]


def test_an_open_block_is_shown_after_what_came_before_it() -> None:
    gathering = Gathering(16)
    first = _chunk(0, 0, 1, has_logprobs=False, has_mask=False, is_last=False)
    gathering.add(first)
    gathering.add(replace(first, token_ids=(1,)))
    preview = replace(first, token_ids=(), text="", preview=(None, 4))
    held, shown = gathering.add(preview)
    assert held.token_ids == (1,) and shown is preview


@pytest.mark.parametrize("value", [0, -1, 1025, 1.5, True, "4"])
def test_how_many_tokens_a_part_may_hold_is_checked(value: object) -> None:
    body = {"request_id": "r", "prompt_token_ids": [1], "tokens_per_part": value}
    with pytest.raises(InvalidRequest, match="tokens_per_part"):
        GenerateRequest.from_body(body)
