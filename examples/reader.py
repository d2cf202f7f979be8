"""The task of the shipped LLaDA-V: what number a picture shows, in which colour, and how many digits it has.

Pictures, questions and answers are those of `examples/digits.py`. A picture is seen twice in a square of 60 pixels:
squeezed into it, and fitted into it as it is; config.json knows no larger canvas. Owns the tokenizer in LLaDA's
layout, the conversation as the published template renders it, and what both squares of a training picture look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from examples.augment import PictureBatch
from examples.digits import CELL, COLOURS, HEIGHT, KINDS, QUESTIONS, Kind
from examples.sums import END_OF_TURN, SPECIAL_TOKENS
from examples.vocabulary import Vocabulary
from language_worker.models.llada_v import SYSTEM_PROMPT

SIDE, PATCH = 60, 10
FEATURES = SIDE // PATCH
IMAGE = "<|reserved_token_0|>"
GENERATION_LENGTH = 8  # five digits or a colour, and the end of the turn to the canvas' end
VOCABULARY_SIZE = 640
BEFORE = (
    f"<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM_PROMPT}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
)
BEHIND = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE; every digit is a token of its own, and so is every word that the task has."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\n+|."), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = (*SPECIAL_TOKENS, IMAGE)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    texts = [SYSTEM_PROMPT, "system user assistant\n\n", *COLOURS, *(q for kind in KINDS for q in QUESTIONS[kind])]
    tokenizer.train_from_iterator([text for text in texts for _ in range(8)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


VOCABULARY = Vocabulary(build_tokenizer)
tokenizer, encode, token_id = VOCABULARY.tokenizer, VOCABULARY.encode, VOCABULARY.token_id


def prompt_ids(question: str, num_rows: int) -> list[int]:
    """A conversation of one picture and one question, the picture's rows in it."""
    return [*encode(BEFORE), *[token_id(IMAGE)] * num_rows, *encode(f"\n{question}{BEHIND}")]


def answer_ids(answer: str) -> list[int]:
    """The answer as the model is to write it."""
    ids = encode(answer)
    return [*ids, *[token_id(END_OF_TURN)] * (GENERATION_LENGTH - len(ids))]


def kept_rows(width: int) -> int:
    """Rows of features that show a picture of this width in the square it is fitted into."""
    inner = int(HEIGHT * (FEATURES / width)) if width > HEIGHT else FEATURES
    return FEATURES - 2 * ((FEATURES - inner) // 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question about one picture of a batch. picture: its index."""

    picture: int
    width: int
    question: str
    answer: str


def draw_samples(rng: numpy.random.Generator, pictures: PictureBatch) -> list[Sample]:
    """A question about every picture; half of them ask for the number."""
    samples = []
    widths = (pictures.cells_wide * CELL).tolist()
    for i, (number, colour, width) in enumerate(zip(pictures.numbers, pictures.colours, widths, strict=True)):
        kind = KINDS[int(rng.choice((0, 0, 1, 2)))]
        answers: dict[Kind, str] = {"number": number, "colour": colour, "count": str(len(number))}
        question = QUESTIONS[kind][int(rng.integers(len(QUESTIONS[kind])))]
        samples.append(Sample(picture=i, width=width, question=question, answer=answers[kind]))
    return samples


def squares(pictures: PictureBatch) -> tuple[Tensor, Tensor]:
    """Pictures squeezed into a square, and fitted into one with black above and below, as the server resizes them:
    two times [B, 3, SIDE, SIDE], normalised."""
    squeezed = torch.empty(len(pictures.numbers), 3, SIDE, SIDE)
    fitted = torch.zeros_like(squeezed)
    for cells in pictures.cells_wide.unique().tolist():
        width, rows = cells * CELL, pictures.cells_wide == cells
        pixels = pictures.pixels[rows, :, :, :width]
        height = min(SIDE, -(-HEIGHT * SIDE // width))
        top = (SIDE - height) // 2
        squeezed[rows] = _resized(pixels, SIDE)
        whole = fitted[rows]
        whole[:, :, top : top + height] = _resized(pixels, height)
        fitted[rows] = whole
    return squeezed / 127.5 - 1, fitted / 127.5 - 1


def _resized(pixels: Tensor, height: int) -> Tensor:
    if pixels.shape[2:] == (height, SIDE):
        return pixels
    smooth = functional.interpolate(pixels, (height, SIDE), mode="bicubic", antialias=True, align_corners=False)
    return smooth.round().clamp(0, 255)


def column_labels(pictures: PictureBatch, numbers: Sequence[str], nobody: int) -> tuple[Tensor, Tensor]:
    """[B, FEATURES]: which digit has its centre in a column of features, and the how many-th it is; `nobody`: none."""
    digits = torch.full((len(numbers), FEATURES), nobody)
    order = torch.full((len(numbers), FEATURES), nobody)
    for row, (number, centres) in enumerate(zip(numbers, pictures.centres, strict=True)):
        width = int(pictures.cells_wide[row]) * CELL
        for place, (digit, x) in enumerate(zip(number, centres, strict=True)):
            column = min(FEATURES - 1, int(x * FEATURES / width))
            digits[row, column], order[row, column] = int(digit), place
    return digits, order
