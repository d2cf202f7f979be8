"""Watches a run: where a number that is not finite was born, and a loss that jumps.

An ordinary step pays for one look at its loss and one at its gradients' norm. Only when one of them is not finite is
the forward pass run once more, with a hook on every module: the first whose inputs were finite and whose output is not
is where it began, or the innermost one that was at work when its next part was handed such a number.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from examples.train.errors import NonFiniteError

LOSS, NORM = "the loss", "the norm of the gradients"  # places that are no module


def locate(model: nn.Module, forward: Callable[[], object], step: int) -> NonFiniteError:
    """The error that names where `forward`, whose loss is not finite, goes wrong; runs it again."""
    if (broken := broken_parameter(model, step)) is not None:
        return broken
    trace = _Trace()
    with torch.no_grad(), trace.watching(model):
        forward()
    place, what = trace.found or (LOSS, f"{LOSS} is not finite, though the output of every module is")
    return NonFiniteError(step, place, what)


def broken_parameter(model: nn.Module, step: int) -> NonFiniteError | None:
    """The error that names the first parameter that is not finite."""
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return NonFiniteError(step, name, f"the weight {name} holds {_counts(parameter)}")
    return None


def broken_gradient(model: nn.Module, step: int) -> NonFiniteError:
    """The error that names the last parameter, in the model's order, whose gradient is not finite.

    Gradients run backwards: everything before the place where one broke is broken too, nothing behind it is.
    """
    broken = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    if not broken:
        return NonFiniteError(step, NORM, f"{NORM} overflows, though each of them is finite")
    name, gradient = broken[-1]
    others = f", and those of {len(broken) - 1} parameters before it are not finite either" if broken[1:] else ""
    return NonFiniteError(step, name, f"the gradient of {name} holds {_counts(gradient)}{others}")


class LossSpikes:
    """Compares each loss with the median of the last ones; `history` is all it remembers."""

    def __init__(self, *, window: int = 100, least: int = 20, factor: float = 2.0) -> None:
        self.history: deque[float] = deque(maxlen=window)
        self.least = least
        self.factor = factor

    def observe(self, loss: float) -> float | None:
        """How many times the median of the losses before it this loss is, if that is a jump."""
        is_judged = len(self.history) >= self.least
        median = statistics.median(self.history) if is_judged else 0.0
        self.history.append(loss)
        return loss / median if median > 0.0 and loss > self.factor * median else None


class _Trace:
    """Watches a forward pass; `found` is (place, description) of the first number that is not finite."""

    def __init__(self) -> None:
        self.found: tuple[str, str] | None = None
        self._at_work: list[str] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on all of its modules, while the context is entered."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                label = f"{name or 'the model'} ({type(module).__name__})"
                before, after = partial(self._enter, label), partial(self._leave, label)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            yield

    def _enter(self, label: str, _module: nn.Module, *given: Any) -> None:
        broken = _first_broken(given)
        if broken is not None and self.found is None:
            place = self._at_work[-1] if self._at_work else "the objective"
            self.found = (_bare(place), f"{place} hands {_counts(broken)} to {label}")
        self._at_work.append(label)

    def _leave(self, label: str, _module: nn.Module, *given_and_output: Any) -> None:
        self._at_work.pop()
        *given, output = given_and_output
        broken = _first_broken(output)
        if broken is not None and self.found is None:
            largest = max((float(t.abs().max()) for t in _tensors(given) if t.numel()), default=0.0)
            what = f"the output of {label} holds {_counts(broken)}; its input reached {largest:.3g}"
            self.found = (_bare(label), what)


def _bare(label: str) -> str:
    return label.rpartition(" (")[0] or label


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _first_broken(value: Any) -> Tensor | None:
    return next((tensor for tensor in _tensors(value) if not _is_finite(tensor)), None)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _counts(tensor: Tensor) -> str:
    num_nan, num_inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{num_nan} nan and {num_inf} inf among {tensor.numel()} numbers"
