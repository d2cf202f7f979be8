"""Every error of the package keeps its type, fields and message across a process border."""

from __future__ import annotations

import pickle

import pytest

from embedding_worker import errors

EXAMPLES = (
    errors.EmbedConfigError("dtype", "must be known"),
    errors.UnsupportedModel("/models/x", "no vision half"),
    errors.InvalidEmbedRequest("no ticket"),
    errors.ImageError(2, "unusable"),
    errors.BadImage(2, "truncated"),
    errors.ImageTooLarge(0, "too many pixels"),
    errors.ImageAspect(1, "too long"),
    errors.TooManyImages(9, 8),
    errors.EmbedQueueFull(4, "requests"),
    errors.OutOfResources("too many open files"),
    errors.EmbedDeadline("it waited"),
    errors.EmbedStopped(),
    errors.EncodeFailed("out of memory"),
)


def _tree(root: type[errors.EmbedError]) -> set[type[errors.EmbedError]]:
    own = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return {root}.union(*map(_tree, own))


def test_there_is_an_example_of_every_error() -> None:
    assert {type(error) for error in EXAMPLES} | {errors.EmbedError} == _tree(errors.EmbedError)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_pickling_keeps_everything(error: errors.EmbedError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
    assert all(str(argument) in str(error) for argument in error.args)
