"""Conversations about pictures as padded token tensors.

A training sample asks about one picture in one to three turns, so that one pass over the picture's tokens pays
for several answers; only the answers and their end token carry loss. Positions follow Qwen2.5-VL: text counts
up on all three axes, an image spreads over height and width, and the text after it goes on from its largest
position. This module knows tokens and positions, not pixels or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from examples.augment import CELLS_HIGH
from examples.demo_tokenizer import NO_PICTURE, SMALL_TALK, SYSTEM_PROMPT, build_tokenizer
from examples.digits import KINDS, QUESTIONS, Kind
from examples.train.masks import IGNORED, answer_spans, next_token_labels
from examples.vocabulary import Vocabulary

OPENING = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
ANSWER_OPENS, ANSWER_ENDS = "<|im_start|>assistant\n", "<|im_end|>"
VOCABULARY = Vocabulary(build_tokenizer)
tokenizer, encode, token_id = VOCABULARY.tokenizer, VOCABULARY.encode, VOCABULARY.token_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBatch:
    """Right-padded; `labels` already stand one place to the left, over the token that predicts them."""

    input_ids: Tensor
    positions: Tensor
    media_mask: Tensor
    labels: Tensor
    lengths: Tensor


def picture_turns(rng: numpy.random.Generator, number: str, colour: str) -> list[Turn]:
    """One to three different questions about one picture, in random order and wording."""
    answers: dict[Kind, str] = {"number": number, "colour": colour, "count": str(len(number))}
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS))[: int(rng.choice((1, 2, 3, 3)))]]
    return [Turn(question=_worded(rng, QUESTIONS[kind]), answer=answers[kind]) for kind in kinds]


def small_talk_turn(rng: numpy.random.Generator) -> Turn:
    """A question without a picture: either a greeting, or one that cannot be answered."""
    if rng.random() < 0.5:
        question = str(rng.choice(list(SMALL_TALK)))
        return Turn(question=question, answer=SMALL_TALK[question])
    return Turn(question=_worded(rng, QUESTIONS[KINDS[int(rng.integers(3))]]), answer=NO_PICTURE)


def conversation(turns: Sequence[Turn], cells_wide: int, *, question_first: bool) -> tuple[list[int], list[int]]:
    """Token ids, and for each the label it should predict (or IGNORED). `cells_wide` 0 means no picture."""
    ids: list[int] = []
    for index, turn in enumerate(turns):
        ids += encode(OPENING if index == 0 else "\n<|im_start|>user\n")
        picture = "<|vision_start|>" + "<|image_pad|>" * (CELLS_HIGH * cells_wide) + "<|vision_end|>"
        if index > 0 or cells_wide == 0:
            ids += encode(turn.question + CLOSING)
        elif question_first:
            ids += encode(turn.question + picture + CLOSING)
        else:
            ids += encode(picture + turn.question + CLOSING)
        ids += encode(turn.answer + ANSWER_ENDS)
    return ids, next_token_labels(ids, answer_spans(ids, encode(ANSWER_OPENS), encode(ANSWER_ENDS)))


def prompt(question: str, cells_wide: int) -> list[int]:
    """What the chat template renders for one picture and one question, up to the answer."""
    picture = "<|vision_start|>" + "<|image_pad|>" * (CELLS_HIGH * cells_wide) + "<|vision_end|>"
    return [*encode(OPENING), *encode(picture + question + CLOSING)]


def collate(samples: Sequence[tuple[list[int], list[int]]], cells_wide: Sequence[int]) -> TextBatch:
    """Pad to the longest sample."""
    longest = max(len(ids) for ids, _ in samples)
    input_ids = torch.full((len(samples), longest), token_id("<|endoftext|>"))
    labels = torch.full((len(samples), longest), IGNORED)
    positions = torch.zeros(3, len(samples), longest, dtype=torch.long)
    for row, (ids, sample_labels) in enumerate(samples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(sample_labels)
        positions[:, row, : len(ids)] = rope_positions(ids, cells_wide[row])
    lengths = torch.tensor([len(ids) for ids, _ in samples])
    media_mask = input_ids == token_id("<|image_pad|>")
    return TextBatch(input_ids=input_ids, positions=positions, media_mask=media_mask, labels=labels, lengths=lengths)


def rope_positions(ids: Sequence[int], cells_wide: int) -> Tensor:
    """[3, L] for at most one picture of CELLS_HIGH x cells_wide cells."""
    positions = torch.arange(len(ids)).repeat(3, 1)
    if cells_wide == 0:
        return positions
    start = list(ids).index(token_id("<|image_pad|>"))
    num_cells = CELLS_HIGH * cells_wide
    cell = torch.arange(num_cells)
    spread = torch.stack([torch.zeros_like(cell), cell // cells_wide, cell % cells_wide])
    positions[:, start : start + num_cells] = start + spread
    positions[:, start + num_cells :] -= num_cells - max(CELLS_HIGH, cells_wide)
    return positions


def _worded(rng: numpy.random.Generator, questions: Sequence[str]) -> str:
    """Now and then as people type: no capital, no final mark."""
    question = questions[int(rng.integers(len(questions)))]
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.1:
        question = question[:-1]
    return question
