"""An answer that begins anew, cut into other chunks than the first: every token and character is delivered once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.replay import AnswerDiffers, Delivered
from language_worker.api import TokenChunk, TokenLogprob

TEXTS = ("a", "", "bc", "d", "", "efg", "h", "i", "", "jk", "l", "m")  # of each token; "" where bytes are held back


def _logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-1.0, rank=1, top=())


def _chunks(cuts: Sequence[int], *, index: int = 0, is_whole: bool = True, offset: int = 0) -> list[TokenChunk]:
    """The answer in chunks that end at `cuts` and at its end; the last one, if whole, says how it ended."""
    ends = sorted({*cuts, len(TEXTS)})
    chunks = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        ids = tuple(100 + offset + i for i in range(start, end))
        chunks.append(
            TokenChunk(
                request_id="r",
                index=index,
                token_ids=ids,
                text="".join(TEXTS[start:end]),
                finish_reason="stop" if is_whole and end == len(TEXTS) else None,
                logprobs=tuple(map(_logprob, ids)),
                mask=tuple(i % 2 for i in ids),
                prompt_logprobs=(None,) if not start else None,
            )
        )
    return chunks


CUTS = st.lists(st.integers(1, len(TEXTS) - 1), max_size=6)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(attempts=st.lists(st.tuples(CUTS, st.integers(0, len(TEXTS))), max_size=3), last=CUTS)
def test_every_token_and_character_once(attempts: list[tuple[list[int], int]], last: list[int]) -> None:
    delivered, seen = Delivered(1), []
    for cuts, num_chunks in [*attempts, (last, len(TEXTS))]:
        delivered.begin_again()
        for chunk in _chunks(cuts)[:num_chunks]:
            fresh = delivered.add(chunk)
            if fresh is not None:
                assert len(fresh.logprobs or ()) == len(fresh.mask or ()) == len(fresh.token_ids)
                seen.append(fresh)
    ids = [token for chunk in seen for token in chunk.token_ids]
    assert ids == list(range(100, 100 + len(TEXTS)))
    assert "".join(chunk.text for chunk in seen) == "".join(TEXTS)
    assert [entry.token_id for chunk in seen for entry in chunk.logprobs or ()] == ids
    assert [bit for chunk in seen for bit in chunk.mask or ()] == [i % 2 for i in ids]
    assert [chunk.finish_reason for chunk in seen].count("stop") == 1 and seen[-1].finish_reason == "stop"
    assert sum(chunk.prompt_logprobs is not None for chunk in seen) == 1
    assert delivered.is_begun


def test_samples_are_told_apart() -> None:
    delivered = Delivered(2)
    first = [delivered.add(chunk) for chunk in _chunks([3], index=0)]
    assert all(first) and delivered.add(_chunks([3], index=1, offset=50)[0]) is not None
    delivered.begin_again()
    assert [delivered.add(chunk) for chunk in _chunks([5, 7], index=0)] == [None, None, None]
    second = [delivered.add(chunk) for chunk in _chunks([5], index=1, offset=50)]
    assert [chunk and chunk.token_ids for chunk in second] == [(153, 154), tuple(range(155, 162))]


@pytest.mark.parametrize("place", range(1, 5))
def test_another_token_is_noticed_before_anything_of_it_is_delivered(place: int) -> None:
    delivered = Delivered(1)
    delivered.add(_chunks([5])[0])
    delivered.begin_again()
    for i, chunk in enumerate(_chunks(range(1, len(TEXTS)))):
        if i == place:
            with pytest.raises(AnswerDiffers, match=f"differs after {place} tokens"):
                delivered.add(replace(chunk, token_ids=(7,)))
            return
        assert delivered.add(chunk) is None


def test_other_text_and_another_end_are_noticed() -> None:
    delivered = Delivered(1)
    delivered.add(_chunks([5])[0])
    delivered.begin_again()
    with pytest.raises(AnswerDiffers):
        delivered.add(replace(_chunks([5])[0], text="abce"))
    ended = Delivered(1)
    ended.add(replace(_chunks([5])[0], finish_reason="stop"))
    ended.begin_again()
    with pytest.raises(AnswerDiffers, match="ends elsewhere"):
        ended.add(_chunks([6])[0])
    longer = Delivered(1)
    longer.add(_chunks([5])[0])
    longer.begin_again()
    with pytest.raises(AnswerDiffers, match="ends elsewhere"):
        longer.add(replace(_chunks([4])[0], finish_reason="length"))


def test_a_long_answer_is_repeated_in_linear_time() -> None:
    """The delivered text is put together once, and not for every chunk."""
    delivered = Delivered(1)
    chunk = _chunks([1])[0]
    for _ in range(2):
        delivered.begin_again()
        for _ in range(1000):
            delivered.add(replace(chunk, prompt_logprobs=None))
    sample = delivered._samples[0]
    assert sample.said is None and sample.texts == ["a" * 1000], "in one piece since the second attempt began"
