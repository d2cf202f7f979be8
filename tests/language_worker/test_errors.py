"""Every error survives pickling with its type, arguments and message."""

import pickle

import pytest

from language_worker import errors


def _tree(root: type[errors.EngineError]) -> list[type[errors.EngineError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


@pytest.mark.parametrize("kind", _tree(errors.EngineError), ids=lambda kind: kind.__name__)
def test_pickle_round_trip(kind: type[errors.EngineError]) -> None:
    error = kind("what happened; what to do")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind and back.args == error.args and str(back) == "what happened; what to do"
    assert back.code == kind.__name__ and back.message == "what happened; what to do"


def test_the_drawn_tree_is_complete() -> None:
    assert errors.__doc__ is not None
    for kind in _tree(errors.EngineError):
        assert kind.__name__ in errors.__doc__
