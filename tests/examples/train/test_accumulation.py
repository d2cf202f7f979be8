"""The gradient of a step is the big batch's, however its labels are spread over micro-batches.

The judge is the big batch's loss, written out with logarithms in float64 and differentiated once.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from examples.train.checkpoint import TrainState
from examples.train.masks import IGNORED
from examples.train.precision import Precision
from examples.train.trainer import Limits, Trainer, split_evenly
from tests.examples.train.toy import VOCABULARY, Heard, Telling, Tokens, Toy
from tests.profiles import IS_SOAK

label = st.sampled_from([IGNORED, *range(VOCABULARY)])
micro_batch = st.lists(st.tuples(st.integers(0, VOCABULARY - 1), label), min_size=1, max_size=8)


def _toy() -> Toy:
    torch.manual_seed(1)
    return Toy().double()


def _stepped(micro_batches: list[Tokens]) -> tuple[list[Tensor], float]:
    """The gradient that one step has used, read off plain gradient descent at rate 1; and the loss it reported."""
    model = _toy()
    before = [p.detach().clone() for p in model.parameters()]
    precision = Precision("float32")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainState(model, optimizer, precision, average=None, streams=[], plan={})
    heard = Heard()
    trainer = Trainer(
        state,
        Telling(model=model, precision=precision),
        lambda _: micro_batches,
        lambda _: 1.0,
        steps=1,
        limits=Limits(clip_norm=float("inf")),
    )
    trainer.run(heard)
    gradients = [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]
    return gradients, heard.steps[0][1]["loss"]


def _oracle(ids: Tensor, labels: Tensor) -> tuple[list[Tensor], float]:
    model = _toy()
    logits = model(ids)
    rows = [i for i, value in enumerate(labels.tolist()) if value != IGNORED]
    terms = [logits[i].exp().sum().log() - logits[i, labels[i]] for i in rows]
    loss = sum(terms, 0.0 * logits.sum()) / max(len(rows), 1)
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)), loss.item()


@settings(deadline=None, max_examples=1000 if IS_SOAK else 25)
@given(st.lists(micro_batch, min_size=1, max_size=5))
def test_accumulated_gradient_is_the_big_batchs(drawn: list[list[tuple[int, int]]]) -> None:
    pieces = [(torch.tensor([i for i, _ in part]), torch.tensor([t for _, t in part])) for part in drawn]
    gradients, loss = _stepped(pieces)
    wanted, wanted_loss = _oracle(torch.cat([ids for ids, _ in pieces]), torch.cat([t for _, t in pieces]))
    assert loss == pytest.approx(wanted_loss, rel=1e-12, abs=1e-12)
    for got, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-13)


def test_a_mean_of_means_would_have_been_seen() -> None:
    long = (torch.arange(8) % VOCABULARY, torch.arange(8) % 3)
    short = (torch.tensor([5]), torch.tensor([9]))
    gradients, _ = _stepped([long, short])
    halves = [_oracle(*long)[0], _oracle(*short)[0]]
    largest = max(float((g - (a + b) / 2).abs().max()) for g, a, b in zip(gradients, *halves, strict=True))
    assert largest > 0.01


def test_a_step_without_labels_moves_nothing() -> None:
    gradients, loss = _stepped([(torch.tensor([1, 2]), torch.tensor([IGNORED, IGNORED]))] * 2)
    assert loss == 0.0
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@given(st.integers(1, 500), st.data())
def test_batches_are_split_evenly_and_wholly(size: int, data: st.DataObject) -> None:
    parts = split_evenly(size, data.draw(st.integers(1, size)))
    assert sum(parts) == size and max(parts) - min(parts) <= 1 and min(parts) >= 1


@pytest.mark.parametrize("parts", [0, 5])
def test_a_split_that_leaves_parts_empty_is_refused(parts: int) -> None:
    with pytest.raises(ValueError, match="batch of 4 cannot be split"):
        split_evenly(4, parts)
