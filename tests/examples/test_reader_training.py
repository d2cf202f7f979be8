"""The program that trained the shipped LLaDA-V: same numbers as plain loops, resumable, splittable, honest labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples import train_reader
from examples.augment import NO_DIGIT, PictureBatch, draw_batch
from examples.digits import COLOURS
from examples.reader import (
    FEATURES,
    GENERATION_LENGTH,
    column_labels,
    draw_samples,
    squares,
    token_id,
    tokenizer,
)
from examples.reader_model import Reader, Tower
from examples.sums import END_OF_TURN, MASK
from examples.train.masks import IGNORED
from examples.train_reader_text import Reading, ReadingPlan, converse, train_text
from examples.train_reader_vision import ColumnHeads, SeeingPlan, train_tower
from tests.examples.train.toy import Heard, weights


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter]) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, step: int) -> None:
    for kept, current in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(current, 1.0 - min(0.995, (step + 1) / (step + 10)))


def _assert_near(found: nn.Module, wanted: nn.Module) -> None:
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted.state_dict()[name], atol=2e-6, rtol=1e-4)


def _column_loss(heads: ColumnHeads, rows: Tensor, pictures: PictureBatch) -> Tensor:
    digit, order = heads.columns(rows).split(NO_DIGIT + 1, dim=-1)
    labels = column_labels(pictures, pictures.numbers, NO_DIGIT)
    colours = torch.tensor([list(COLOURS).index(colour) for colour in pictures.colours])
    loss = 0.2 * functional.cross_entropy(heads.colour(rows.mean(1)), colours)
    for scores, wanted, weight in zip((digit, order), labels, (1.0, 0.5), strict=True):
        loss = loss + weight * functional.cross_entropy(scores.flatten(0, 1), wanted.repeat(1, FEATURES).flatten())
        together = scores.unflatten(1, (FEATURES, FEATURES)).mean(1)
        loss = loss + weight * functional.cross_entropy(together.flatten(0, 1), wanted.flatten())
    return loss


def test_seeing_gives_the_numbers_of_a_plain_loop() -> None:
    plan = SeeingPlan(steps=3, batch_size=3)
    trained, trained_heads = train_tower(5, plan, Heard())
    torch.manual_seed(5)
    tower, heads = Tower(), ColumnHeads()
    average, rng = copy.deepcopy(tower), numpy.random.default_rng([5, 1])
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=plan.weight_decay)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = plan.learning_rate * ((step + 1) / 100)
        pictures = draw_batch(rng, 3, max_digits=2, warp=plan.warp)
        _step(optimizer, _column_loss(heads, tower(squares(pictures)[0]), pictures), parameters)
        _average(average, tower, step)
    _assert_near(trained, average)
    _assert_near(trained_heads, heads)


def test_reading_gives_the_numbers_of_a_plain_loop() -> None:
    torch.manual_seed(8)
    plan, seen, tower, heads = ReadingPlan(steps=4, batch_size=2, snapshot_every=3), [], Tower(), ColumnHeads()
    plain_tower, plain_heads = copy.deepcopy(tower), copy.deepcopy(heads)
    trained = train_text(5, tower, heads, plan, Heard(), lambda step, _: seen.append(step))
    assert seen == [3, 4]
    torch.manual_seed(6)
    plain, rng = Reader(plain_tower), numpy.random.default_rng([5, 2])
    average = copy.deepcopy(plain)
    text, vision = [*plain.text.parameters(), plain.newline], [*plain_tower.parameters(), *plain_heads.parameters()]
    groups = [{"params": text}, {"params": vision}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=plan.weight_decay)
    for step in range(4):
        for group, rate in zip(optimizer.param_groups, (plan.learning_rate, plan.vision_learning_rate), strict=True):
            group["lr"] = rate * ((step + 1) / 100)
        pictures = draw_batch(rng, 2, warp=plan.warp)
        batch = converse(pictures, draw_samples(rng, pictures))
        squeezed, fitted = squares(pictures)
        overview = plain_tower(squeezed)
        rows = plain.arranged(overview, plain_tower(fitted).detach(), batch.widths)
        logits = plain.text.logits(plain.hidden(batch.token_ids, batch.is_real, rows))
        loss = functional.cross_entropy(logits.transpose(1, 2), batch.labels)
        _step(optimizer, loss + 0.3 * _column_loss(plain_heads, overview, pictures), [*text, *vision])
        _average(average, plain, step)
    _assert_near(trained, average)


def test_micro_batches_give_the_big_batchs_gradient() -> None:
    torch.manual_seed(2)
    rng, reader = numpy.random.default_rng(0), Reader(Tower())
    drawn = []
    for size in (1, 3):
        pictures = draw_batch(rng, size)
        drawn.append(converse(pictures, draw_samples(rng, pictures)))
    objective = Reading(reader, ColumnHeads(), 0.3)
    own = [objective.counts(batch) for batch in drawn]
    counts = {name: sum(count[name] for count in own) for name in ("hidden", "pictures")}
    shares = [objective.share(batch, 0, counts).loss for batch in drawn]
    sum(shares[1:], shares[0]).backward()
    gradients = torch.cat([p.grad.flatten() for p in reader.parameters() if p.grad is not None])
    reader.zero_grad()
    for batch, count in zip(drawn, own, strict=True):  # answers and columns weigh differently in each part
        answers = Reading(reader, ColumnHeads(), 0.0).share(batch, 0, count).loss
        (answers * count["hidden"] / counts["hidden"]).backward()
        rows = reader.tower(squares(batch.pictures)[0])
        columns = _column_loss(objective.heads, rows, batch.pictures)
        (0.3 * columns * count["pictures"] / counts["pictures"]).backward()
    wanted = torch.cat([p.grad.flatten() for p in reader.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients, wanted, atol=1e-6, rtol=1e-4)


def test_answers_and_nothing_else_are_hidden() -> None:
    rng = numpy.random.default_rng(3)
    pictures = draw_batch(rng, 24)
    samples = draw_samples(rng, pictures)
    batch = converse(pictures, samples)
    seen = 0
    for row, sample in enumerate(samples):
        length = int(batch.is_real[row].sum())
        hidden = batch.labels[row] != IGNORED
        assert not hidden[: length - GENERATION_LENGTH].any() and not hidden[length:].any()
        assert (batch.token_ids[row][hidden] == token_id(MASK)).all()
        whole = torch.where(hidden, batch.labels[row], batch.token_ids[row])[length - GENERATION_LENGTH : length]
        text = tokenizer().decode(whole.tolist(), skip_special_tokens=False)
        assert text.rstrip() == sample.answer + END_OF_TURN * text.count(END_OF_TURN)
        seen += int(hidden.all() or hidden.sum() == GENERATION_LENGTH)
    assert 0 < seen < 24, "some answers are hidden whole, as decoding begins"


def test_columns_are_told_what_stands_in_them() -> None:
    pictures = draw_batch(numpy.random.default_rng(1), 16)
    digits, order = column_labels(pictures, pictures.numbers, NO_DIGIT)
    for row, number in enumerate(pictures.numbers):
        assert "".join(str(d) for d in digits[row].tolist() if d != NO_DIGIT) == number
        assert [o for o in order[row].tolist() if o != NO_DIGIT] == list(range(len(number)))


class Stopped(BaseException):
    """As a signal does."""


class Stopping(Heard):
    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        super().figures(step, figures)
        if step == 3:
            raise Stopped


def _sees(heard: Heard, file: Path | None) -> nn.Module:
    plan = SeeingPlan(steps=4, batch_size=3, num_micro_batches=2, snapshot_every=2)
    return nn.ModuleList(train_tower(9, plan, heard, file))


def _reads(heard: Heard, file: Path | None) -> nn.Module:
    torch.manual_seed(4)
    plan = ReadingPlan(steps=4, batch_size=2, num_micro_batches=2, snapshot_every=2)
    return train_text(9, Tower(), ColumnHeads(), plan, heard, lambda *_: None, file)


@pytest.mark.parametrize("phase", [_sees, _reads])
def test_a_stopped_phase_goes_on_bit_for_bit(phase: Callable[[Heard, Path | None], nn.Module], tmp_path: Path) -> None:
    whole, file = Heard(), tmp_path / "state.pt"
    wanted = weights(phase(whole, None))
    with pytest.raises(Stopped):
        phase(Stopping(), file)
    heard = Heard()
    assert weights(phase(heard, file)) == wanted
    assert heard.steps == whole.steps[-len(heard.steps) :]


def test_the_program_trains_measures_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path / "a"), "--vision-steps", "1", "--text-steps", "1", "--evaluate", "3"]
    command += ["--micro-batches", "16", "--threads", "1", "--state", str(tmp_path / "state")]
    train_reader.main(command)
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert "exact of 3 questions about held-out glyphs, served" in " ".join(capsys.readouterr().out.split())
    command[1] = str(tmp_path / "b")
    train_reader.main(command)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == first
