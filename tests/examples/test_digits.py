"""Drawing is a pure function of its seed, and held-out glyphs stay out of training."""

from __future__ import annotations

import numpy
import pytest

from examples.augment import CELLS_HIGH, CELLS_WIDE, NO_DIGIT, draw_batch
from examples.digits import CELL, COLOURS, HEIGHT, KINDS, MAX_WIDTH, QUESTIONS, Split, draw, is_right, load_glyphs

SPLITS: tuple[Split, ...] = ("train", "held-out")


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_draws_the_same_picture(split: Split) -> None:
    for seed in range(20):
        first, second = draw(seed, split), draw(seed, split)
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.number, first.colour, first.glyph_ids) == (second.number, second.colour, second.glyph_ids)


def test_seeds_and_splits_draw_different_pictures() -> None:
    pictures = {draw(seed, split).image.tobytes() for seed in range(50) for split in SPLITS}
    assert len(pictures) == 100


def test_the_splits_are_disjoint_and_complete() -> None:
    glyphs = load_glyphs()
    train, held_out = set(glyphs.train.tolist()), set(glyphs.held_out.tolist())
    assert not train & held_out
    assert train | held_out == set(range(len(glyphs.digits)))
    assert len(held_out) == 359
    assert set(glyphs.digits[glyphs.held_out].tolist()) == set(range(10))


@pytest.mark.parametrize("split", SPLITS)
def test_a_composition_draws_from_its_own_side_only(split: Split) -> None:
    glyphs = load_glyphs()
    side = set(glyphs.side(split).tolist())
    for seed in range(200):
        composition = draw(seed, split)
        assert set(composition.glyph_ids) <= side
        assert composition.number == "".join(str(glyphs.digits[i]) for i in composition.glyph_ids)


def test_training_batches_never_touch_held_out_glyphs(monkeypatch: pytest.MonkeyPatch) -> None:
    glyphs = load_glyphs()
    poisoned = glyphs.ink.copy()
    poisoned[glyphs.held_out] = numpy.nan
    monkeypatch.setattr(glyphs.__class__, "ink", property(lambda _: poisoned))
    batch = draw_batch(numpy.random.default_rng(0), 256)
    assert bool(batch.patches.isfinite().all())


def test_sizes_suit_the_model() -> None:
    for seed in range(200):
        composition = draw(seed, "held-out")
        width, height = composition.image.size
        assert height == HEIGHT
        assert width % CELL == 0
        assert 2 * CELL <= width <= MAX_WIDTH
        assert 1 <= composition.count <= 5
        assert composition.colour in COLOURS


@pytest.mark.parametrize("count", range(1, 6))
def test_the_number_of_digits_can_be_chosen(count: int) -> None:
    assert draw(7, "held-out", count=count).count == count


def test_every_digit_of_a_training_picture_labels_its_own_column() -> None:
    batch = draw_batch(numpy.random.default_rng(1), 64)
    for number, labels in zip(batch.numbers, batch.digit_labels, strict=True):
        for row in labels.view(CELLS_HIGH, CELLS_WIDE).tolist():
            assert "".join(str(label) for label in row if 0 <= label < NO_DIGIT) == number


def test_answers() -> None:
    composition = draw(3, "held-out")
    assert [composition.answer(kind) for kind in KINDS] == [
        composition.number,
        composition.colour,
        str(len(composition.number)),
    ]
    assert all(QUESTIONS[kind] for kind in KINDS)
    assert is_right(f" {composition.number}\n", composition.number)
    assert not is_right(composition.number + "0", composition.number)
