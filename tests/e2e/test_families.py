"""Every family and layout: whatever is prefilled, decoded, in whose company and on which worker, it is the reference.

The judge is the reference's logits of the whole text, in float32 or float64, computed at once. Each text is the
reference's own greedy one, so that a request for any part of it must write the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.errors import BadRequest, ChatTemplateError, ConfigError
from cluster.padded import generate_padded, padded_logits
from cluster.prompts import image_bytes
from tests.profiles import IS_SOAK
from tests.tiny_families import FAMILIES, Subject
from tests.tiny_models import random_image
from tests.waiting import eventually

TOLERANCE = 1e-4
NUM_BEHIND = 16
CHUNKS = (1, 3, 5, 0)
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096, "max_model_len": 150,
    "page_size": 4, "block_size": 8, "default_allocate_tokens": 8,
}  # fmt: skip
SPLIT = {"prefill": 1, "decode": 1}
RECURRENT = ("fusion_tree",)  # state that goes on from every position: no prefix of it is kept
SEEDS = range(20 if IS_SOAK else 1)
NAMES = list(FAMILIES)
UNQUANTISED = ("mixtral", "moe", "dots1", "nanochat", "fusion_tree")  # mixtures of experts, and models of their own


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _greedy(count: int, banned: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=0, banned_token_ids=banned)


def _check_every_split(llm: LLM, subject: Subject, behind: list[int], logits: torch.Tensor) -> None:
    """prefill(n) and decode(m) for every n, all at once: the rest of the text, at the full forward's likelihoods."""
    starts = range(len(behind))
    asked = [subject.prompt(behind[:n]) for n in starts]
    answers = llm.generate(asked, [_greedy(len(behind) - n, subject.banned) for n in starts])
    first = logits.shape[0] - len(behind)
    wanted = logits.double().log_softmax(-1)
    for n, answer in zip(starts, answers, strict=True):
        (output,) = answer.outputs
        assert answer.num_prompt_tokens == first + n
        assert output.token_ids == behind[n:], f"prefill {first + n}, then decode"
        assert output.logprobs is not None
        for i, entry in enumerate(output.logprobs, start=n):
            assert abs(entry.logprob - float(wanted[first + i - 1, behind[i]])) < TOLERANCE, (n, i)


def _check_padded(llm: LLM, subject: Subject, behind: list[int], logits: torch.Tensor) -> None:
    """A left-padded batch is its rows: the text from its start, or where that holds images what follows them."""
    stem = [] if subject.images else subject.stem
    rows = [[*stem, *behind[:n]] for n in (3, 11, 6)]
    width = max(map(len, rows)) + 2
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), 1
    found = padded_logits(llm, ids, mask)
    written, grown = generate_padded(llm, ids, mask, max_new_tokens=5, sampling=_greedy(5, subject.banned))
    assert torch.equal(grown, torch.cat([mask, torch.ones(len(rows), 5)], dim=1).bool())
    for i, row in enumerate(rows):
        alone = llm.logits(row) if subject.images else logits[: len(row)]
        assert (found[i, width - len(row) :] - alone).abs().max() < TOLERANCE
        assert not found[i, : width - len(row)].any()
        single = llm.generate([row], _greedy(5, subject.banned))[0].outputs[0].token_ids
        assert written[i, width:].tolist() == single
        assert subject.images or single == behind[len(row) - len(stem) :][:5]


@pytest.mark.parametrize("name", NAMES)
def test_every_split_and_chunking_is_the_full_forward(name: str, tmp_path: Path) -> None:
    for seed in SEEDS:
        subject = FAMILIES[name](tmp_path / str(seed), seed)
        behind = subject.greedy(NUM_BEHIND)
        logits = subject.logits(behind)
        for chunk in CHUNKS if IS_SOAK else (CHUNKS[NAMES.index(name) % 4],):
            with LLM(model=str(subject.folder), max_prefill_chunk=chunk, **SETTINGS) as llm:
                assert (llm.logits(subject.prompt(behind)) - logits).abs().max() < TOLERANCE, f"chunks of {chunk}"
                _check_every_split(llm, subject, behind, logits)
                _check_padded(llm, subject, behind, logits)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_workers_are_the_full_forward(name: str, tmp_path: Path) -> None:
    """The same over two language workers: KV of every length moves, the second time some of it is there already."""
    subject = FAMILIES[name](tmp_path, 1)
    behind = subject.greedy(NUM_BEHIND)
    logits = subject.logits(behind)
    with LLM(model=str(subject.folder), workers=SPLIT, max_prefill_chunk=7, **SETTINGS) as llm:
        for _ in range(2):
            _check_every_split(llm, subject, behind, logits)
        assert (llm.logits(subject.prompt(behind)) - logits).abs().max() < TOLERANCE
        stats = llm.stats()
        assert stats["decode-0"]["kv_tokens_imported_total"] > 0, "KV was moved"
        assert (stats["decode-0"]["prefix_cache_hits_total"] > 0) == (not name.startswith(RECURRENT))
        _await_empty(llm)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_in_any_company_split_or_streamed(name: str, tmp_path: Path) -> None:
    """Prompts of many lengths, sampled: alone, all at once in too small a cache, on two workers, streamed."""
    subject = FAMILIES[name](tmp_path, 2)
    behind = subject.greedy(NUM_BEHIND)
    asked = [subject.prompt(behind[: 3 * i]) for i in range(5)]
    warm = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.95, top_k=40, n=2, ignore_eos=True)
    params = [replace(warm, seed=i) for i in range(5)]
    alone: list[list[list[int]]] = []
    with LLM(model=str(subject.folder), max_num_seqs=2, prefix_cache=False, **SETTINGS) as llm:
        for prompt, own in zip(asked, params, strict=True):
            alone.append(_tokens(llm.generate([prompt], [own]))[0])
        streamed = [token for chunk in llm.stream(asked[4], replace(params[4], n=1)) for token in chunk.token_ids]
        assert streamed == alone[4][0]
        assert alone[0][0] != alone[0][1], "samples of one seed differ"
        assert _tokens(llm.generate([asked[0]], [params[1]]))[0] != alone[0], "so do seeds"
    longest = _length(subject, behind) + 10
    tight = {**SETTINGS, "kv_cache_tokens": longest, "max_model_len": longest}
    with LLM(model=str(subject.folder), max_prefill_chunk=5, **tight) as llm:
        assert _tokens(llm.generate(asked, params)) == alone
        assert _tokens(llm.generate(asked[4:], params[4:])) == alone[4:]  # one of its own samples has to give way
        assert llm.stats()["language-0"]["num_preemptions_total"] > 0
    with LLM(model=str(subject.folder), workers=SPLIT, **SETTINGS) as llm:
        assert _tokens(llm.generate(asked, params)) == alone


def _length(subject: Subject, behind: list[int]) -> int:
    """Positions of the longest prompt, images at their full length."""
    return int(subject.logits(behind).shape[0])


def _tokens(answers: list[Any]) -> list[list[list[int]]]:
    return [[output.token_ids for output in answer.outputs] for answer in answers]


@pytest.mark.parametrize("name", NAMES)
def test_images_are_seen_or_refused(name: str, tmp_path: Path) -> None:
    subject = FAMILIES[name](tmp_path, 3)
    with LLM(model=str(subject.folder), **SETTINGS) as llm:
        if not subject.images:
            with pytest.raises(BadRequest, match="image"):
                llm.generate({"prompt": "What is this?", "images": [image_bytes(random_image(30, 30))]}, _greedy(1))
            return
        prompt = subject.prompt()
        assert (llm.logits(prompt) - subject.logits([])).abs().max() < TOLERANCE
        turned = {**prompt, "images": prompt["images"][::-1]}
        assert (llm.logits(prompt)[-1] - llm.logits(turned)[-1]).abs().max() > 100 * TOLERANCE, "which is where matters"


def test_a_video_is_refused(tmp_path: Path) -> None:
    subject = FAMILIES["qwen2_5_vl"](tmp_path, 0)
    message = {"role": "user", "content": [{"type": "video", "video": "x.mp4"}, {"type": "text", "text": "?"}]}
    with (
        LLM(model=str(subject.folder), **SETTINGS) as llm,
        pytest.raises(ChatTemplateError, match="content parts of type 'video' are not supported"),
    ):
        llm.chat([message], _greedy(1))


def test_more_than_one_device_a_model_is_refused(tmp_path: Path) -> None:
    subject = FAMILIES["llama"](tmp_path, 0)
    with pytest.raises(ConfigError, match="unknown setting tensor_parallel_size"):
        LLM(model=str(subject.folder), tensor_parallel_size=2, **SETTINGS)


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_are_near_or_refused(name: str, tmp_path: Path) -> None:
    subject = FAMILIES[name](tmp_path, 0)
    wanted = subject.logits([])
    if any(part in name for part in UNQUANTISED):
        with pytest.raises(Exception, match="'int8' "):
            LLM(model=str(subject.folder), quantization="int8", **SETTINGS)
        return
    with LLM(model=str(subject.folder), quantization="int8", **SETTINGS) as llm:
        error = (llm.logits(subject.prompt()) - wanted).norm() / wanted.norm()
    assert 1e-5 < float(error) < 0.1


def _await_empty(llm: LLM) -> None:
    """No page, row, stream or ticket is left; last acknowledgements may still be on their way."""
    names = ("transfer_blocks_in_use", "transfer_streams_open", "transfer_tickets_open", "kv_pages_referenced")

    def left() -> dict[tuple[str, str], Any]:
        return {(w, name): stats[name] for w, stats in llm.stats().items() for name in names if stats.get(name)}

    eventually(lambda: not left(), lambda: f"left behind: {left()}")
