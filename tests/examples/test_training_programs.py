"""The programs that trained the shipped models: same numbers as loops written out plainly, resumable, splittable.

A few tiny steps each; what the loop itself promises is tested in `tests/examples/train`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples import train_demo, train_diffusion
from examples.augment import PictureBatch, draw_batch
from examples.demo_accuracy import real_rows
from examples.diffusion_model import Llada, Shape
from examples.sums import MASK, build_tokenizer
from examples.train.errors import ResumeError
from examples.train.masks import IGNORED
from examples.train.precision import Precision
from examples.train_data import TextBatch, conversation, picture_turns, tokenizer
from examples.train_diffusion import DiffusionPlan, hide
from examples.train_model import TinyQwen, VisionShape, VisionTower
from examples.train_text import Reading, TextPlan, draw_conversations, new_text_model, train_text
from examples.train_vision import CellHeads, VisionPlan, train_vision
from tests.examples.train.toy import Heard, weights

WIDTH = 192


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _new_vision(seed: int) -> tuple[VisionTower, CellHeads]:
    torch.manual_seed(seed)
    return VisionTower(VisionShape(), WIDTH), CellHeads(WIDTH)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter]) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _cell_loss(heads: CellHeads, rows: Tensor, batch: PictureBatch) -> Tensor:
    outputs = heads.linear(rows.float()).split(heads.sizes, dim=-1)
    labels = (batch.digit_labels, batch.order_labels, batch.colour_labels)
    losses = [functional.cross_entropy(o.flatten(0, 1), t.flatten()) for o, t in zip(outputs, labels, strict=True)]
    return losses[0] + 0.5 * losses[1] + 0.3 * losses[2]


def test_seeing_gives_the_numbers_of_a_plain_loop() -> None:
    plan = VisionPlan(steps=3, batch_size=3)
    tower, heads = train_vision(5, WIDTH, plan, Heard())
    plain_tower, plain_heads = _new_vision(5)
    rng = numpy.random.default_rng([5, 1])
    parameters = [*plain_tower.parameters(), *plain_heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=plan.weight_decay)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = plan.learning_rate * ((step + 1) / 100)
        batch = draw_batch(rng, 3, max_digits=2)
        with torch.autocast("cpu", torch.bfloat16):
            rows = plain_tower(batch.patches, batch.cells_wide)
        _step(optimizer, _cell_loss(plain_heads, rows, batch), parameters)
    assert weights(tower) == weights(plain_tower)
    assert weights(heads) == weights(plain_heads)


def test_reading_gives_the_numbers_of_a_plain_loop() -> None:
    plan, seen = TextPlan(steps=4, batch_size=2, num_small_talk=1, checkpoint_every=3), []
    model = train_text(5, *_new_vision(5), plan, Heard(), lambda step, _: seen.append(step))
    assert seen == [3, 4]
    tower, heads = _new_vision(5)
    plain = TinyQwen(tower, new_text_model(5))
    average, rng = copy.deepcopy(plain), numpy.random.default_rng([5, 2])
    vision = [*tower.parameters(), *heads.parameters()]
    groups = [{"params": list(plain.model.parameters())}, {"params": vision}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=plan.weight_decay)
    for step in range(4):
        for group, rate in zip(optimizer.param_groups, (plan.learning_rate, plan.vision_learning_rate), strict=True):
            group["lr"] = rate * ((step + 1) / 100)
        pictures = draw_batch(rng, 2)
        text = draw_conversations(rng, pictures, 1)
        with torch.autocast("cpu", torch.bfloat16):
            rows = tower(pictures.patches, pictures.cells_wide)
            media = real_rows(rows, pictures.cells_wide)
            hidden = plain(text.input_ids, text.positions, media, text.media_mask)
            logits = plain.logits(hidden[text.labels >= 0])
        answers = functional.cross_entropy(logits.float(), text.labels[text.labels >= 0])
        loss = answers + 0.3 * (1.0 - step / 4) * _cell_loss(heads, rows, pictures)
        _step(optimizer, loss, [*vision, *plain.model.parameters()])
        with torch.no_grad():
            for kept, current in zip(average.parameters(), plain.parameters(), strict=True):
                kept.lerp_(current, 1.0 - min(0.995, (step + 1) / (step + 10)))
    assert weights(model) == weights(average)


def test_filling_gives_the_numbers_of_a_plain_loop() -> None:
    text, plan = build_tokenizer(), DiffusionPlan(steps=5, batch_size=3)
    model = train_diffusion.train(5, plan, text, Heard(), lambda *_: None)
    torch.manual_seed(5)
    rng, mask_id = random.Random(5), text.token_to_id(MASK)
    plain = Llada(Shape(vocab_size=288))
    average = copy.deepcopy(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.98), weight_decay=0.02)
    for step in range(5):
        share = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / 5))
        optimizer.param_groups[0]["lr"] = plan.learning_rate * max(share, 0.01)
        batch = train_diffusion.draw_batch(rng, text, 3)
        hidden = hide(batch)
        logits = plain(batch.token_ids.masked_fill(hidden, mask_id), batch.is_real)
        loss = functional.cross_entropy(logits[hidden], batch.token_ids[hidden])
        _step(optimizer, loss, list(plain.parameters()))
        with torch.no_grad():
            for kept, current in zip(average.parameters(), plain.parameters(), strict=True):
                kept.lerp_(current, 1.0 - min(0.998, (step + 1) / (step + 20)))
    assert weights(model) == weights(average)


def test_the_loss_falls() -> None:
    heard = Heard()
    plan = DiffusionPlan(steps=40, batch_size=6, learning_rate=2e-2)
    train_diffusion.train(0, plan, build_tokenizer(), heard, lambda *_: None)
    losses = [figures["loss"] for _, figures in heard.steps]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def _joined(parts: list[tuple[PictureBatch, TextBatch]]) -> tuple[PictureBatch, TextBatch]:
    """One big batch with the same samples, padded to the longest of all."""
    pictures, texts = zip(*parts, strict=True)
    longest = max(text.input_ids.shape[1] for text in texts)

    def padded(name: str, value: int) -> Tensor:
        tensors = [getattr(text, name) for text in texts]
        dim = tensors[0].dim() - 2  # positions have their axes first
        return torch.cat([functional.pad(t, (0, longest - t.shape[-1]), value=value) for t in tensors], dim=dim)

    joined = {}
    for field in dataclasses.fields(PictureBatch):
        parts_of_it = [getattr(p, field.name) for p in pictures]
        joined[field.name] = torch.cat(parts_of_it) if isinstance(parts_of_it[0], Tensor) else sum(parts_of_it, ())
    return PictureBatch(**joined), TextBatch(
        input_ids=padded("input_ids", 0),
        positions=padded("positions", 0),
        media_mask=padded("media_mask", False),
        labels=padded("labels", IGNORED),
        lengths=torch.cat([text.lengths for text in texts]),
    )


def test_micro_batches_of_conversations_give_the_big_batchs_gradient() -> None:
    rng = numpy.random.default_rng(0)
    parts = []
    for size, small_talk in ((1, 3), (3, 0), (2, 1)):
        pictures = draw_batch(rng, size)
        parts.append((pictures, draw_conversations(rng, pictures, small_talk)))
    tower, heads = _new_vision(1)
    model = TinyQwen(tower, new_text_model(1))
    objective = Reading(model=model, heads=heads, plan=TextPlan(), precision=Precision("float32"))
    gradients = []
    for batches in (parts, [_joined(parts)]):
        counts: Mapping[str, int] = {
            name: sum(objective.counts(batch)[name] for batch in batches) for name in ("tokens", "cells")
        }
        model.zero_grad()
        for batch in batches:
            objective.share(batch, 0, counts).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).norm()) < 1e-5 * float(gradients[1].norm())


class Stopped(BaseException):
    """As a signal does."""


class Stopping(Heard):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        super().figures(step, figures)
        if step == self.at:
            raise Stopped


def _reads(heard: Heard, file: Path | None) -> nn.Module:
    plan = TextPlan(steps=4, batch_size=2, num_small_talk=1, checkpoint_every=2, num_micro_batches=2)
    return train_text(9, *_new_vision(9), plan, heard, lambda *_: None, file)


def _sees(heard: Heard, file: Path | None) -> nn.Module:
    return nn.ModuleList(train_vision(9, WIDTH, VisionPlan(steps=2, batch_size=2), heard, file))


def _fills(heard: Heard, file: Path | None) -> nn.Module:
    plan = DiffusionPlan(steps=6, batch_size=3, checkpoint_every=2, num_micro_batches=3)
    return train_diffusion.train(9, plan, build_tokenizer(), heard, lambda *_: None, file)


@pytest.mark.parametrize("program", [_reads, _fills, _sees])
def test_a_stopped_program_goes_on_bit_for_bit(
    program: Callable[[Heard, Path | None], nn.Module], tmp_path: Path
) -> None:
    whole = Heard()
    wanted = weights(program(whole, None))
    file = tmp_path / "state.pt"
    with pytest.raises(Stopped):
        program(Stopping(3 if len(whole.steps) > 2 else 1), file)
    heard = Heard()
    assert weights(program(heard, file)) == wanted
    assert heard.steps == whole.steps[-len(heard.steps) :]
    assert weights(program(Heard(), file)) == wanted, "and once more, from its end"


def test_answers_and_nothing_else_carry_loss() -> None:
    rng = numpy.random.default_rng(3)
    for number in ("7", "40", "12345"):
        turns = picture_turns(rng, number, "purple")
        ids, labels = conversation(turns, 4, question_first=bool(rng.integers(2)))
        assert all(label in (IGNORED, after) for label, after in zip(labels, ids[1:], strict=False))
        learned = tokenizer().decode([label for label in labels if label != IGNORED], skip_special_tokens=False)
        assert learned.replace(" ", "") == "".join(f"{turn.answer}<|im_end|>" for turn in turns)
        assert labels[-1] == IGNORED


def test_the_demo_program_trains_measures_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "--out",
        str(tmp_path / "a"),
        "--vision-steps",
        "1",
        "--text-steps",
        "1",
        "--evaluate",
        "2",
        "--checks",
        "2",
    ]
    command += ["--micro-batches", "16", "--threads", "1", "--precision", "float32", "--state", str(tmp_path / "state")]
    train_demo.main(command)
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert {"question", "asked", "number", "colour", "all"} <= set(capsys.readouterr().out.split())
    command[1] = str(tmp_path / "b")
    train_demo.main(command)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == first
    assert capsys.readouterr().out.count("going on from step 1 of") == 2
    with pytest.raises(ResumeError, match="made with seed 0, not 1"):
        train_demo.main([*command, "--seed", "1"])


def test_the_diffusion_program_trains_measures_and_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(tmp_path), "--steps", "2", "--batch-size", "3", "--evaluate", "2"]
    train_diffusion.main([*command, "--state", str(tmp_path / "state.pt")])
    first = (tmp_path / "model.safetensors").read_bytes()
    train_diffusion.main([*command, "--micro-batches", "1", "--state", str(tmp_path / "state.pt")])
    assert (tmp_path / "model.safetensors").read_bytes() == first
    assert "exact of 2 held-out questions" in capsys.readouterr().out
