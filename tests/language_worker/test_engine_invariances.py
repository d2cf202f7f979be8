"""What must not change a result: how the prompt is cut, who else is in the batch, preemption, arrival of media."""

from pathlib import Path

import pytest
import torch

from language_worker import engine_builder
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import GREEDY, Media, Results, drive, make_engine, prompt, request
from tests.tiny_tokenizer import TOKEN_IDS

PAD = TOKEN_IDS["<|image_pad|>"]
MIXED = [
    GREEDY,
    SamplingParams(temperature=0.9, seed=7, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.9, seed=8, max_tokens=15, ignore_eos=True, n=2),
    SamplingParams(temperature=0, repetition_penalty=1.4, frequency_penalty=0.5, max_tokens=18, ignore_eos=True),
    SamplingParams(temperature=0.7, min_p=0.05, seed=9, max_tokens=10, ignore_eos=True, logprobs=2),
]


def _requests(count=10):
    return [request(f"r{i}", prompt(3 + 11 * i % 70, seed=i), MIXED[i % len(MIXED)]) for i in range(count)]


def _tokens(results: Results) -> dict[str, list[list[int]]]:
    return {
        name: [result.tokens(i) for i in range(1 + max(c.index for c in result.chunks))]
        for name, result in sorted(results.items())
    }


def _media(hidden=64, seed=0) -> Media:
    generator = torch.Generator().manual_seed(seed)
    return Media(grids=[(1, 4, 6), (1, 8, 4)], rows=torch.randn(14, hidden, generator=generator))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 31, 32, 33, 63])
@pytest.mark.parametrize("page_size", [4, 32])
def test_prompt_logits_do_not_depend_on_the_chunks(chunk: int, page_size: int, tiny: Path) -> None:
    asked = [request("a", prompt(70), return_logits=True)]
    whole = drive(make_engine(tiny), asked)["a"]
    cut = drive(make_engine(tiny, max_prefill_chunk=chunk, page_size=page_size), asked)["a"]
    torch.testing.assert_close(cut.logits, whole.logits, atol=1e-5, rtol=1e-5)
    assert cut.tokens() == whole.tokens()


def test_prefill_of_any_part_and_decode_of_the_rest_gives_the_same_next_tokens(tiny: Path) -> None:
    """prefill(n) + decode(m) = prefill(n + m): continue from every cut of a generated text."""
    ids = prompt(5)
    full = drive(make_engine(tiny), [request("a", ids)])["a"].tokens()
    engine = make_engine(tiny)
    for cut in range(1, len(full)):
        result = drive(engine, [request(f"c{cut}", (*ids, *full[:cut]))])[f"c{cut}"]
        assert result.tokens()[: len(full) - cut] == full[cut:]


def test_batch_equals_single(tiny: Path) -> None:
    together = _tokens(drive(make_engine(tiny), _requests()))
    engine = make_engine(tiny)
    alone = {}
    for one in _requests():
        alone |= _tokens(drive(engine, [one]))
    assert together == alone


@pytest.mark.parametrize("seats", [1, 2, 3])
def test_few_seats_change_nothing(seats: int, tiny: Path) -> None:
    assert _tokens(drive(make_engine(tiny, max_num_seqs=seats), _requests())) == _tokens(
        drive(make_engine(tiny), _requests())
    )


@pytest.mark.parametrize("num_pages", [24, 30, 40])
def test_preemption_changes_nothing(num_pages: int, tiny: Path) -> None:
    """Pools far too small for the batch: sequences lose their KV and recompute it."""
    free = _tokens(drive(make_engine(tiny), _requests()))
    engine = make_engine(tiny, page_size=4, kv_cache_tokens=4 * num_pages, max_model_len=4 * 24)
    tight = drive(engine, _requests())
    assert _tokens(tight) == free
    assert engine.stats()["num_preemptions_total"] > 0
    assert engine.stats()["kv_pages_referenced"] == 0


def test_media_rows_survive_preemption_and_partial_arrival(tiny: Path) -> None:
    """Rows that trickle in one by one, in a pool that preempts: same tokens as all at once with room."""
    ids = (*prompt(5), PAD, *prompt(3, seed=1), PAD, *prompt(4, seed=2))
    asked = [request(f"m{i}", ids, GREEDY, num_media=2, return_logits=i == 0) for i in range(4)]
    media = {one.request_id: _media(seed=i) for i, one in enumerate(asked)}
    plain = drive(make_engine(tiny), asked, media)
    engine = make_engine(tiny, page_size=4, kv_cache_tokens=4 * 16, max_model_len=4 * 12)
    results, written = Results(), dict.fromkeys(media, 0)
    for one in asked:
        engine.submit(one)
        engine.announce(one.request_id, 14, media[one.request_id].items())
    while len(results) < 4 or any(r.done is None for r in results.values()):
        results.take(engine.step())
        engine.scheduler.check_invariants()
        for name, row in written.items():
            buffer = engine.media_buffer(name)
            if buffer is not None and row < 14:
                buffer.write(row, media[name].rows[row : row + 1])
                written[name] += 1
    assert _tokens(results) == _tokens(plain)
    torch.testing.assert_close(results["m0"].logits, plain["m0"].logits, atol=1e-5, rtol=1e-5)
    assert engine.stats()["num_preemptions_total"] > 0
    assert engine.stats()["input_buffer_rows_reserved"] == 0


def test_a_part_too_small_for_a_step_waits_for_more_rows(tiny: Path) -> None:
    """7 tokens of text, 4 rows, 2 tokens: with parts of 10 at least, the rows' arrival decides when a step runs."""
    engine = make_engine(tiny, min_partial_chunk=10)
    engine.submit(request("a", (*prompt(7), PAD, *prompt(2, seed=1)), num_media=1))
    media = Media(grids=[(1, 4, 4)], rows=torch.randn(4, 64, generator=torch.Generator().manual_seed(1)))
    engine.announce("a", 4, media.items())
    assert engine.step().did_run and not engine.scheduler.running[0].kv_len, "its rows may come; nothing was computed"
    assert not engine.step().did_run
    buffer = engine.media_buffer("a")
    assert buffer is not None
    buffer.write(0, media.rows[:2])
    assert not engine.step().did_run, "9 tokens can be computed"
    buffer.write(2, media.rows[2:3])
    assert engine.step().did_run
    (seq,) = engine.scheduler.running
    assert seq.kv_len == 10
    assert not engine.step().did_run
    buffer.write(3, media.rows[3:])
    assert engine.step().did_run, "what is left is computed however little it is"
    assert seq.kv_len == 13


def test_a_chunk_bound_below_the_smallest_part_does_not_stop_a_prefill(tiny: Path) -> None:
    engine = make_engine(tiny, min_partial_chunk=64, max_prefill_chunk=4)
    engine.submit(request("a", (*prompt(9), PAD), num_media=1))
    media = Media(grids=[(1, 4, 4)], rows=torch.randn(4, 64, generator=torch.Generator().manual_seed(1)))
    engine.announce("a", 4, media.items())
    for computed in (4, 8):
        assert engine.step().did_run
        assert engine.scheduler.running[0].kv_len == computed
    assert not engine.step().did_run


def test_text_before_the_first_row_is_computed_while_rows_are_awaited(tiny: Path) -> None:
    engine = make_engine(tiny, min_partial_chunk=1)
    engine.submit(request("a", (*prompt(9), PAD, *prompt(2, seed=1)), num_media=1))
    assert not engine.step().did_run
    media = Media(grids=[(1, 4, 4)], rows=torch.randn(4, 64))
    engine.announce("a", 4, media.items())
    assert engine.step().did_run
    (seq,) = engine.scheduler.running
    assert seq.kv_len == 9
    assert not engine.step().did_run
    buffer = engine.media_buffer("a")
    assert buffer is not None
    buffer.write(0, media.rows[:3])
    assert engine.step().did_run
    assert seq.kv_len == 12


def test_same_seed_same_tokens_whatever_the_traffic(tiny: Path) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=1234, n=3, max_tokens=16, ignore_eos=True)
    alone = drive(make_engine(tiny), [request("a", prompt(12), sampling)])["a"]
    crowd = [*_requests(6), request("a", prompt(12), sampling), *(request(f"z{i}", prompt(9, i)) for i in range(5))]
    crowded = drive(make_engine(tiny, max_num_seqs=5, max_prefill_chunk=3), crowd)["a"]
    assert [alone.tokens(i) for i in range(3)] == [crowded.tokens(i) for i in range(3)]
    assert len({tuple(alone.tokens(i)) for i in range(3)}) == 3, "samples of one request must differ"
    other = SamplingParams(temperature=1.0, top_p=0.95, seed=1235, n=3, max_tokens=16, ignore_eos=True)
    assert drive(make_engine(tiny), [request("a", prompt(12), other)])["a"].tokens() != alone.tokens()


def test_prompt_logprobs_agree_with_prompt_logits(tiny: Path) -> None:
    ids = prompt(33)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=3, logprobs=3)
    result = drive(make_engine(tiny, max_prefill_chunk=8), [request("a", ids, sampling, return_logits=True)])["a"]
    entries = result.chunks[0].prompt_logprobs
    assert entries is not None and entries[0] is None and len(entries) == len(ids)
    logprobs = torch.log_softmax(result.logits.double(), dim=-1)
    for i in range(1, len(ids)):
        entry, row = entries[i], logprobs[i - 1]
        assert entry is not None and entry.token_id == ids[i]
        assert entry.logprob == pytest.approx(row[ids[i]].item(), abs=1e-4)
        assert entry.rank == 1 + int((row > row[ids[i]]).sum())
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()
    assert all(chunk.prompt_logprobs is None for chunk in result.chunks[1:])
    first = result.chunks[0].logprobs
    assert first is not None and first[0].token_id == int(result.logits[-1].argmax()) and first[0].rank == 1


def test_a_step_computes_no_more_prompt_logits_than_its_cap_holds(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does that change them, or keep others from their tokens meanwhile."""
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=2)
    asked = [request("a", prompt(33), sampling), request("b", prompt(20, 1), sampling), request("c", prompt(5, 2))]
    whole = drive(make_engine(tiny), asked)
    monkeypatch.setattr(engine_builder, "STEP_LOGITS_BYTES", 4 * 9 * make_engine(tiny).spec.vocab_size)
    engine, rows = make_engine(tiny), []
    forward = engine.runner.model.forward

    def counting(inputs, caches):
        logits = forward(inputs, caches)
        rows.append(logits.shape[0])
        return logits

    engine.runner.model.forward = counting
    capped = drive(engine, asked)
    assert max(rows) <= 9 + 3 and sum(rows) >= 53, rows
    for name in "ab":
        ours, theirs = (r[name].chunks[0].prompt_logprobs for r in (capped, whole))
        assert ours is not None and theirs is not None and len(ours) == len(theirs)
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            assert one is not None and other is not None and one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert capped[name].tokens() == whole[name].tokens()
    assert capped["c"].tokens() == whole["c"].tokens()
