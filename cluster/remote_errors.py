"""Failures that came from a worker, as errors of their own classes: `except PromptTooLong` works around `LLM`, too.

Over the wire a failure is the name of a class and a message. Where this process knows the class, what is raised is of
it and still a RemoteFailure with both; of the fields that the class may have beside its message, only that arrives.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from embedding_worker.errors import EmbedError
from language_worker.errors import EngineError
from transfer.errors import RemoteFailure


class _KnownFailure(RemoteFailure):
    """Stands before a known class, and hides how that is made and what it says."""

    code: str = ""
    message: str = ""

    def __init__(self, code: str, message: str) -> None:
        Exception.__init__(self, code, message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return known_failure, (RemoteFailure(self.code, self.message),)


def known_failure(failure: Exception) -> Exception:
    """A RemoteFailure as an error of the class that its code names as well; anything else as it is."""
    if not isinstance(failure, RemoteFailure) or failure.code not in _known_classes():
        return failure
    return _class_of(failure.code)(failure.code, failure.message)


@cache
def _known_classes() -> dict[str, type[Exception]]:
    return {kind.__name__: kind for root in (EngineError, EmbedError) for kind in _family(root)}


def _family(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for kind in root.__subclasses__():
        yield from _family(kind)


@cache
def _class_of(code: str) -> type[_KnownFailure]:
    kind = _known_classes()[code]
    return type(code, (_KnownFailure, kind), {"__module__": __name__, "__doc__": kind.__doc__})
