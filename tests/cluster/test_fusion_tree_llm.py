"""FusionTree through `LLM`: split or not, seeds, padded batches as its own code takes them, and what the CLI says.

Where its repository goes wrong, and what shows that this does not:
    cached decoding        test_fusion_tree_invariances: splits, chunks, moves; test_split_and_together_give_the_same
    top-p                  test_top_p_keeps_what_the_reference_keeps
    masks' dtypes          test_masks_of_every_dtype_are_the_same_mask
    masks in decoding      test_a_left_padded_batch_continues_each_row_as_alone
    dtypes, pads           test_fusion_tree: test_every_layer_keeps_the_dtype; test_pads_change_nothing
    number of heads        test_fusion_tree: VARIANTS, test_what_the_configuration_says_is_judged
    --config, bad files    test_generate_takes_its_configuration_and_never_a_random_model
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TopPLogitsWarper

from cluster import LLM, SamplingParams
from cluster.__main__ import main
from cluster.errors import BadRequest
from cluster.padded import generate_padded, padded_logits
from tests.cluster.ledger import await_empty
from tests.language_worker.helpers import prompt
from tests.tiny_fusion_tree import SIZES, VOCAB, logits_of, make_fusion_tree, tensors_of
from tests.tiny_tokenizer import NUM_TOKENS

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "page_size": 4, "max_model_len": 250}
SPLIT = {"prefill": 1, "decode": 1}
PAD = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fusion_tree(tmp_path_factory.mktemp("fusion"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    before = torch.get_num_threads()
    with LLM(model=str(folder), kv_cache_tokens=2000, **SETTINGS) as llm:
        yield llm
    torch.set_num_threads(before)


VARIETY = [
    SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=3, ignore_eos=True),
    SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, seed=1, logprobs=3, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=10, temperature=1.0, top_k=7, seed=2, n=2, best_of=4, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=1.2, seed=9, stop=["a", "e"], repetition_penalty=1.3),
    SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
]
PROMPTS = [prompt(3 + 17 * i, seed=i, vocab=VOCAB) for i in range(len(VARIETY))]


def _ask(llm: LLM) -> list[list[list[int]]]:
    outputs = llm.generate([*map(list, PROMPTS), [5]], [*VARIETY, VARIETY[0]])
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def test_split_and_together_give_the_same(folder: Path, llm: LLM) -> None:
    """The recurrent state goes with the pages; not all fit the decode worker's cache at once."""
    expected = _ask(llm)
    assert expected == _ask(llm), "and so does asking again"
    settings = {**SETTINGS, "kv_cache_tokens": 260, "max_prefill_chunk": 13}
    with LLM(model=str(folder), workers=SPLIT, **settings) as split:
        for _ in range(2):
            assert _ask(split) == expected
        await_empty(split, ("kv_buffer_rows_reserved",))
        assert split.stats()["decode-0"]["kv_tokens_imported_total"] > 0


def test_a_buffer_that_state_does_not_fit_is_named(folder: Path) -> None:
    with (
        LLM(model=str(folder), workers=SPLIT, language={"kv_buffer_tokens": 20}, **SETTINGS) as split,
        pytest.raises(Exception, match="kv_buffer_tokens"),
    ):
        split.generate([list(PROMPTS[0])], VARIETY[0])


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9])
def test_top_p_keeps_what_the_reference_keeps(llm: LLM, top_p: float) -> None:
    ids = list(PROMPTS[2])
    scores = logits_of(SIZES, tensors_of(SIZES), ids)[-1:, :NUM_TOKENS]
    kept = set(TopPLogitsWarper(top_p)(None, scores.clone())[0].isfinite().nonzero()[:, 0].tolist())
    sampling = SamplingParams(max_tokens=1, temperature=1.0, top_p=top_p, seed=3, n=128, ignore_eos=True)
    drawn = {sample.token_ids[0] for sample in llm.generate([ids], sampling)[0].outputs}
    assert drawn <= kept and len(drawn) >= min(len(kept), 4)


# -- padded batches ---------------------------------------------------------------------------------------------------


def _padded(left: bool) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    rows = [list(prompt(length, seed=length, vocab=VOCAB)) for length in (3, 30, 19, 1)]
    width = max(map(len, rows)) + 2
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        own = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, own], mask[i, own] = torch.tensor(row), 1
    return ids, mask, rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_change_nothing(llm: LLM, side: str) -> None:
    ids, mask, rows = _padded(side == "left")
    logits = padded_logits(llm, ids, mask)
    for i, row in enumerate(rows):
        wanted = logits_of(SIZES, tensors_of(SIZES), row)
        assert (logits[i, mask[i].bool()] - wanted).abs().max() < 1e-4
    assert not logits[~mask.bool()].any()
    ids[~mask.bool()] = 7  # whatever a pad is
    assert torch.equal(padded_logits(llm, ids, mask), logits)


def test_masks_of_every_dtype_are_the_same_mask(llm: LLM) -> None:
    ids, mask, _ = _padded(True)
    dtypes = (torch.int64, torch.float32, torch.bool, torch.bfloat16)
    results = [padded_logits(llm, ids, mask.to(dtype)) for dtype in dtypes]
    answers = [generate_padded(llm, ids, mask.to(dtype), max_new_tokens=6) for dtype in dtypes]
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(part, first) for answer in answers for part, first in zip(answer, answers[0], strict=True))


def test_a_left_padded_batch_continues_each_row_as_alone(llm: LLM) -> None:
    ids, mask, rows = _padded(True)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    full, grown = generate_padded(llm, ids, mask, max_new_tokens=8, sampling=sampling)
    assert full.shape == grown.shape == (4, ids.shape[1] + 8)
    assert torch.equal(grown[:, : ids.shape[1]], mask.bool()) and grown[:, ids.shape[1] :].all()
    for i, row in enumerate(rows):
        new = full[i, ids.shape[1] :].tolist()
        wanted = logits_of(SIZES, tensors_of(SIZES), [*row, *new[:-1]])[len(row) - 1 :, :NUM_TOKENS]
        assert new == wanted.argmax(1).tolist()


def test_rows_that_end_are_padded_and_masked(llm: LLM) -> None:
    ids, mask, rows = _padded(True)
    first = llm.generate(rows, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))[0].outputs[0].token_ids
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=(first[2],))
    full, grown = generate_padded(llm, ids, mask, max_new_tokens=9, pad_token_id=299, sampling=sampling)
    assert full[0, ids.shape[1] :].tolist() == [*first, *[299] * 6]
    assert grown[0, ids.shape[1] :].tolist() == [True] * 3 + [False] * 6


@pytest.mark.parametrize(
    ("mask", "words"),
    [([[1, 0, 1], [1, 1, 1]], "row 0.*between"), ([[1, 1, 1], [0, 0, 0]], "row 1.*none"), ([[1, 1]], "shapes")],
)
def test_masks_that_make_no_sense_are_refused(llm: LLM, mask: list[list[int]], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        padded_logits(llm, torch.ones(2, 3, dtype=torch.int64), torch.tensor(mask))


# -- the command line -------------------------------------------------------------------------------------------------


def test_generate_takes_its_configuration_and_never_a_random_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--config` counts: without it the weights alone are not enough; a damaged file is an error, whatever it says."""
    folder = make_fusion_tree(tmp_path / "model", layout="bare")
    (folder / "config.json").unlink()
    config = tmp_path / "serve.yaml"
    overrides = "config_overrides: {window_size: 16, global_heads: 1}"
    config.write_text(f"language: {{num_threads: 1, {overrides}}}\n", encoding="utf-8")

    def run(*options: str) -> tuple[int, Any]:
        common = ("--prompt", "Hello", "--device", "cpu", "--max-tokens", "4", "--temperature", "0")
        return main(["generate", "--model", str(folder), *common, *options]), capsys.readouterr()

    code, told = run()
    assert code == 2 and "window_size" in told.err
    code, told = run("--config", str(config))
    assert code == 0 and told.out.strip()
    path = folder / "checkpoint_step_40.pt"
    path.write_bytes(path.read_bytes()[:5000])
    code, told = run("--config", str(config))
    assert code == 2 and "checkpoint_step_40.pt" in told.err and not told.out
