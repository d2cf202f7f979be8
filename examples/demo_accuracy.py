"""How often the training model answers exactly right on freshly drawn pictures of held-out glyphs.

One question a picture, the three kinds in turn, one to five digits evenly, greedy decoding without a cache: the
whole padded batch runs again for every token, which is quick enough for answers of at most six tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor

from examples.augment import CELLS_HIGH, CELLS_WIDE, to_patches
from examples.digits import CELL, HEIGHT, KINDS, MAX_DIGITS, MAX_WIDTH, QUESTIONS, Composition, Kind, draw, is_right
from examples.train.masks import IGNORED
from examples.train_data import collate, prompt, token_id, tokenizer
from examples.train_model import TinyQwen

EVALUATION_SEED = 1_000_000
MAX_NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One question about one picture, and the answer that counts as right."""

    composition: Composition
    kind: Kind
    question: str

    @property
    def expected(self) -> str:
        return self.composition.answer(self.kind)


def evaluation_set(size: int, first_seed: int = EVALUATION_SEED) -> list[Asked]:
    """Item i draws seed `first_seed + i`; kinds, counts and wordings take turns."""
    asked = []
    for i in range(size):
        kind = KINDS[i % len(KINDS)]
        wordings = QUESTIONS[kind]
        composition = draw(first_seed + i, "held-out", count=1 + i // len(KINDS) % MAX_DIGITS)
        asked.append(Asked(composition=composition, kind=kind, question=wordings[i // 15 % len(wordings)]))
    return asked


def measure(model: TinyQwen, asked: Sequence[Asked]) -> dict[str, tuple[int, int]]:
    """(right, asked) by kind, and under "all"."""
    replies = answer(model, [(item.composition.image, item.question) for item in asked])
    counts = dict.fromkeys((*KINDS, "all"), (0, 0))
    for item, reply in zip(asked, replies, strict=True):
        right = int(is_right(reply, item.expected))
        for name in (item.kind, "all"):
            counts[name] = (counts[name][0] + right, counts[name][1] + 1)
    return counts


@torch.no_grad()
def answer(model: TinyQwen, items: Sequence[tuple[Image.Image, str]]) -> list[str]:
    """Greedy replies, without the end token."""
    cells_wide = [image.width // CELL for image, _ in items]
    patches = to_patches(torch.stack([_canvas(image) for image, _ in items]))
    rows = real_rows(model.visual(patches, torch.tensor(cells_wide)), torch.tensor(cells_wide))
    ids = [prompt(question, wide) for (_, question), wide in zip(items, cells_wide, strict=True)]
    starts = [len(row) for row in ids]
    end = token_id("<|im_end|>")
    running = set(range(len(ids)))
    for _ in range(MAX_NEW_TOKENS):
        batch = collate([(row, [IGNORED] * len(row)) for row in ids], cells_wide)
        hidden = model(batch.input_ids, batch.positions, rows, batch.media_mask)
        best = model.logits(hidden[torch.arange(len(ids)), batch.lengths - 1]).argmax(-1).tolist()
        for row in sorted(running):
            ids[row].append(best[row])
        running = {row for row in running if best[row] != end}
        if not running:
            break
    return [tokenizer().decode(row[start:]) for row, start in zip(ids, starts, strict=True)]


def real_rows(rows: Tensor, cells_wide: Tensor) -> Tensor:
    """Rows of all cells that are picture and not canvas padding, picture by picture, in raster order."""
    column = torch.arange(CELLS_HIGH * CELLS_WIDE) % CELLS_WIDE
    return rows[column[None, :] < cells_wide[:, None]]


def _canvas(image: Image.Image) -> Tensor:
    canvas = torch.zeros(3, HEIGHT, MAX_WIDTH)
    canvas[:, :, : image.width] = torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)
    return canvas
