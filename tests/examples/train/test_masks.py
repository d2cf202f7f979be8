"""Which positions carry loss, told by an oracle that never searches: it builds the ids and knows where answers are."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from examples.train.masks import IGNORED, answer_spans, count_labels, masked_mean, next_token_labels

OPENING, ENDING = [91, 92], [99]
plain = st.lists(st.integers(0, 90), max_size=6)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(plain, plain), max_size=5), plain, st.booleans())
def test_answers_and_their_ends_carry_loss_and_nothing_else(
    turns: list[tuple[list[int], list[int]]], tail: list[int], is_cut: bool
) -> None:
    ids: list[int] = []
    is_answer: list[bool] = []
    for question, answer in turns:
        ids += question + OPENING + answer + ENDING
        is_answer += [False] * (len(question) + len(OPENING)) + [True] * (len(answer) + len(ENDING))
    ids, is_answer = ids + tail, is_answer + [False] * len(tail)
    if is_cut and turns:  # a limit of length falls into the last answer
        end = len(ids) - len(tail) - 1
        ids, is_answer = ids[:end], is_answer[:end]
    labels = next_token_labels(ids, answer_spans(ids, OPENING, ENDING))
    predicted = [ids[i + 1] if i + 1 < len(ids) and is_answer[i + 1] else IGNORED for i in range(len(ids))]
    assert labels == predicted


def test_an_answer_that_opens_the_text_loses_only_its_first_token() -> None:
    assert next_token_labels([5, 6, 7], [(0, 2)]) == [6, IGNORED, IGNORED]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([IGNORED, 0, 1, 2, 3, 4]), min_size=1, max_size=20), st.integers(0, 2**31))
def test_the_mean_is_the_formulas(labels: list[int], seed: int) -> None:
    logits = torch.randn(len(labels), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logits.requires_grad_()
    label = torch.tensor(labels)
    loss = masked_mean(logits, label, count_labels(label))
    rows = [i for i, value in enumerate(labels) if value != IGNORED]
    wanted = sum(
        (logits[i].exp().sum().log() - logits[i, labels[i]] for i in rows), torch.zeros((), dtype=torch.float64)
    ) / max(len(rows), 1)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(gradient.isfinite().all())
    assert all(bool((gradient[i] == 0).all()) == (i not in rows) for i in range(len(labels)))


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(4000, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    labels = torch.arange(4000) % 7
    wanted = torch.nn.functional.cross_entropy(logits.double(), labels)
    loss = masked_mean(logits, labels, 4000)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
