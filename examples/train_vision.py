"""First phase: teach the vision tower alone to see digits, their order and their colour in every cell.

Three linear heads read each merged 28x28 cell: which digit's centre lies in this column (or none), which digit
of the number it is, counted from the left, and the ink's colour. They exist only while training; no checkpoint
holds them. A tower that already answers these lets the text half learn to read in a few hundred steps, where
learning both at once leaves the loss flat for thousands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.augment import NO_DIGIT, NO_ORDER, PictureBatch, draw_batch
from examples.digits import COLOURS
from examples.train_model import VisionShape, VisionTower

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionPlan:
    """How long and how hard the first phase trains."""

    steps: int = 2800
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05


class CellHeads(nn.Module):
    """The auxiliary classifiers: one linear layer, its outputs split three ways."""

    sizes = (NO_DIGIT + 1, NO_ORDER + 1, len(COLOURS))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, rows: Tensor, batch: PictureBatch) -> tuple[Tensor, dict[str, float]]:
        """Summed loss, and the share of real cells that each head gets right."""
        outputs = self.linear(rows.float()).float().split(self.sizes, dim=-1)
        labels = (batch.digit_labels, batch.order_labels, batch.colour_labels)
        losses = [functional.cross_entropy(o.flatten(0, 1), t.flatten()) for o, t in zip(outputs, labels, strict=True)]
        real = batch.digit_labels != -100
        right = {
            name: float((output.argmax(-1) == label)[real].float().mean())
            for name, output, label in zip(("digit", "order", "colour"), outputs, labels, strict=True)
        }
        return losses[0] + 0.5 * losses[1] + 0.3 * losses[2], right


def train_vision(seed: int, out_size: int, plan: VisionPlan, report: Report) -> tuple[VisionTower, CellHeads]:
    """A tower whose rows tell digit, order and colour of every cell."""
    torch.manual_seed(seed)
    rng = numpy.random.default_rng([seed, 1])
    tower, heads = VisionTower(VisionShape(), out_size), CellHeads(out_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=plan.weight_decay)
    for step in range(plan.steps):
        set_learning_rate(optimizer, plan.learning_rate * cosine_schedule(step, plan.steps))
        batch = draw_batch(rng, plan.batch_size, max_digits=2 if step < 100 else 5)
        with torch.autocast("cpu", torch.bfloat16):
            rows = tower(batch.patches, batch.cells_wide)
        loss, right = heads(rows, batch)
        take_step(optimizer, loss, parameters)
        report(step + 1, {"loss": loss.item(), **right})
    return tower, heads


def cosine_schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, *rates: float) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
