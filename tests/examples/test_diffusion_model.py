"""The shipped diffusion model: sound in its format, right about sums it never saw, and as right in few forwards."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster import LLM, DiffusionParams, SamplingParams
from cluster.cli.parser import build_parser
from cluster.demo import DIFFUSION_MODEL_DIR, SUMS, answer_to_sums, questions
from examples.diffusion_model import Llada, Shape, save
from examples.sums import GENERATION_LENGTH, answer_ids, answer_to, build_tokenizer, draw_question, is_held_out
from tests.oracles_llada import LladaOracle


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    before = torch.get_num_threads()
    with LLM(model=str(DIFFUSION_MODEL_DIR), dtype="float32", device="cpu", num_threads=1) as llm:
        yield llm
    torch.set_num_threads(before)


def ask(llm: LLM, questions: list[str], params: DiffusionParams) -> tuple[int, float]:
    """(exact answers, tokens per forward)."""
    sampling = SamplingParams(max_tokens=GENERATION_LENGTH, temperature=0.0, diffusion=params)
    answers = llm.chat([[{"role": "user", "content": question}] for question in questions], sampling)
    num_right = sum(a.outputs[0].text == answer_to(q) for a, q in zip(answers, questions, strict=True))
    num_tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return num_right, num_tokens / sum(answer.hops["forwards"] for answer in answers)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DIFFUSION_MODEL_DIR.iterdir()) < 4_000_000


def test_few_forwards_are_as_right_as_one_token_each(llm: LLM) -> None:
    rng = random.Random(11)
    questions = [draw_question(rng, held_out=True) for _ in range(60)]
    slow, one = ask(llm, questions, DiffusionParams(schedule="static", block_length=8, kv_policy="none"))
    fast, several = ask(llm, questions, DiffusionParams(block_length=8))
    assert slow >= 54 and fast >= slow - 1
    assert one <= 1.0 and several >= 3.0


def test_shipped_sums_were_held_out_of_training() -> None:
    pairs = [tuple(map(int, part.split("+"))) for question in SUMS for part in question.split()]
    assert all(is_held_out(left, right) for left, right in pairs)
    assert all(answer_to_sums(question) == answer_to(question) for question in SUMS)


def test_the_demo_fills_in_its_blocks_and_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    options = build_parser().parse_args(["demo", "--diffusion", "--device", "cpu"])
    assert options.run(options) == 0
    shown = capsys.readouterr().out
    assert all(answer_to_sums(question) in shown for question in SUMS)
    assert all(f"{asked.image.name} {asked.text}" in shown for asked in questions())
    (right,) = re.findall(rf"(\d+) of {len(SUMS) + len(questions())} answers are right", shown)
    assert int(right) >= len(SUMS) + 7, "the reader may misread two of the shipped pictures"


def test_what_is_trained_is_what_is_served(tmp_path: Path) -> None:
    """The training code's forward is the oracle's on the folder it writes."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = Llada(Shape(vocab_size=288, n_layers=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    save(model, tokenizer, tmp_path)
    ids = torch.tensor(answer_ids(tokenizer, "12+34 56+78"))
    with torch.no_grad():
        logits = model(ids[None], torch.ones(1, len(ids), dtype=torch.bool))[0]
    torch.testing.assert_close(logits.double(), LladaOracle(tmp_path)(ids), atol=1e-4, rtol=1e-4)
