"""Compositions of real handwritten digits, the questions asked about them, and the exact answers.

The glyphs are scikit-learn's bundled "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
CC BY 4.0): 1797 drawings of 8x8 pixels. A seeded permutation splits them once into training glyphs and
held-out glyphs; a composition draws from one side only. Everything is a function of (seed, split).
This module knows nothing of tokens, models or training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy
from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "held-out"]
Kind = Literal["number", "colour", "count"]

CELL = 28
HEIGHT = 2 * CELL
MAX_WIDTH = 6 * CELL
MAX_DIGITS = 5
SPLIT_SEED = 20
HELD_OUT_SHARE = 0.2

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 35),
    "green": (20, 140, 55),
    "blue": (35, 70, 210),
    "orange": (245, 140, 10),
    "purple": (135, 40, 165),
    "black": (25, 25, 25),
}

KINDS: tuple[Kind, ...] = ("number", "colour", "count")
QUESTIONS: dict[Kind, tuple[str, ...]] = {
    "number": (
        "What number is written here?",
        "Which number is written here?",
        "What number do you see?",
        "What number is this?",
        "Read the number.",
    ),
    "colour": (
        "What colour are the digits?",
        "What color are the digits?",
        "What colour is the number?",
        "What color is the number?",
        "Which colour do you see?",
        "Which color do you see?",
    ),
    "count": (
        "How many digits are there?",
        "How many digits do you see?",
        "How many digits does the number have?",
        "Count the digits.",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """One picture and everything that can be asked about it."""

    image: Image.Image
    number: str
    colour: str
    glyph_ids: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.number)

    def answer(self, kind: Kind) -> str:
        return {"number": self.number, "colour": self.colour, "count": str(self.count)}[kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the digits of one picture go: pixel centres, left to right, and their common size."""

    width: int
    size: float
    centres: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Glyphs:
    """All glyphs as ink in 0..1, their digits, and the two disjoint sides of the split."""

    ink: NDArray[numpy.float32]
    digits: NDArray[numpy.int64]
    train: NDArray[numpy.int64]
    held_out: NDArray[numpy.int64]

    def side(self, split: Split) -> NDArray[numpy.int64]:
        return self.train if split == "train" else self.held_out


def draw(seed: int, split: Split, count: int | None = None) -> Composition:
    """One composition; the same arguments give the same pixels."""
    rng = numpy.random.default_rng([seed, 0 if split == "train" else 1])
    glyphs = load_glyphs()
    drawn_count = int(rng.integers(1, MAX_DIGITS + 1))
    layout = draw_layout(rng, count if count is not None else drawn_count)
    glyph_ids = rng.choice(glyphs.side(split), size=len(layout.centres))
    colour = str(rng.choice(list(COLOURS)))
    background, ink = draw_palette(rng, colour)
    image = _paint(layout, [glyphs.ink[i] for i in glyph_ids], background, ink)
    number = "".join(str(glyphs.digits[i]) for i in glyph_ids)
    return Composition(image=image, number=number, colour=colour, glyph_ids=tuple(int(i) for i in glyph_ids))


def is_right(reply: str, expected: str) -> bool:
    """Exact: only surrounding white space is forgiven."""
    return reply.strip() == expected


@lru_cache(maxsize=1)
def load_glyphs() -> Glyphs:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = numpy.random.default_rng(SPLIT_SEED).permutation(len(bunch.target))
    num_held_out = int(len(order) * HELD_OUT_SHARE)
    return Glyphs(
        ink=(bunch.images / 16.0).astype(numpy.float32),
        digits=bunch.target.astype(numpy.int64),
        train=numpy.sort(order[num_held_out:]),
        held_out=numpy.sort(order[:num_held_out]),
    )


def draw_layout(rng: numpy.random.Generator, count: int) -> Layout:
    """Digits stand at least 28 pixels apart, so no two centres share a 28-pixel column."""
    size = float(rng.uniform(CELL, 33.0))
    fewest_cells = max(2, -(-int(count * size + 1) // CELL))
    width = CELL * int(rng.integers(fewest_cells, MAX_WIDTH // CELL + 1))
    slack = width - count * size
    gaps = rng.uniform(0.0, min(9.0, slack / count), size=count)
    left = float(rng.uniform(0.0, slack - gaps[1:].sum()))
    middle = HEIGHT / 2 + float(rng.uniform(-7.0, 7.0))
    centres = []
    for i in range(count):
        x = left + (i + 0.5) * size + float(gaps[1 : i + 1].sum())
        centres.append((x, middle + float(rng.uniform(-3.0, 3.0))))
    return Layout(width=width, size=size, centres=tuple(centres))


def draw_palette(rng: numpy.random.Generator, colour: str) -> tuple[NDArray[numpy.float32], NDArray[numpy.float32]]:
    """A light background and a slightly varied ink, as RGB in 0..255."""
    background = rng.uniform(228.0, 255.0, size=3)
    ink = numpy.clip(numpy.array(COLOURS[colour]) + rng.uniform(-18.0, 18.0, size=3), 0.0, 255.0)
    return background.astype(numpy.float32), ink.astype(numpy.float32)


def _paint(
    layout: Layout,
    inks: list[NDArray[numpy.float32]],
    background: NDArray[numpy.float32],
    ink: NDArray[numpy.float32],
) -> Image.Image:
    side = round(layout.size)
    alpha = numpy.zeros((HEIGHT, layout.width), dtype=numpy.float32)
    for (x, y), glyph in zip(layout.centres, inks, strict=True):
        tile = Image.fromarray(glyph).resize((side, side), Image.Resampling.BICUBIC)
        top = min(max(round(y - side / 2), 0), HEIGHT - side)
        left = min(max(round(x - side / 2), 0), layout.width - side)
        view = alpha[top : top + side, left : left + side]
        numpy.maximum(view, numpy.clip(numpy.asarray(tile) * 1.2 - 0.05, 0.0, 1.0), out=view)
    pixels = background + alpha[:, :, None] * (ink - background)
    return Image.fromarray(numpy.rint(pixels).astype(numpy.uint8))
