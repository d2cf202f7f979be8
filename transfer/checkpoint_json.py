"""JSON files of a model folder: read in one place, where what cannot be read is named with its file and position.

Also says of which kind a value must be, for files whose readers take it for granted. Knows no tensors, no models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard

from transfer.errors import TransferError

Kind = Literal[
    "size", "count", "positive", "amount", "flag", "text", "map", "sizes", "counts", "numbers", "names", "ids"
]  # fmt: skip
Kinds = Mapping[str, Kind]

_NEEDED: Mapping[Kind, str] = {
    "size": "a positive integer",
    "count": "an integer of at least 0",
    "positive": "a positive number",
    "amount": "a number of at least 0",
    "flag": "true or false",
    "text": "a string",
    "map": "an object",
    "sizes": "a list of positive integers",
    "counts": "a list of integers of at least 0",
    "numbers": "a list of numbers",
    "names": "a list of strings",
    "ids": "a token id or a list of them",
}
_LARGEST = 2**31  # of an integer that counts something
_LARGEST_NUMBER = 1e300


class CheckpointError(TransferError):
    """A model folder cannot be read, or does not hold what the model needs. `problems` names every finding."""

    def __init__(self, folder: str, problems: tuple[str, ...]) -> None:
        super().__init__(folder, problems)
        self.folder = folder
        self.problems = problems

    def __str__(self) -> str:
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        return f"checkpoint {self.folder} cannot be loaded, {len(self.problems)} problem(s):{listed}"


def read_text(path: Path) -> str:
    """A text file of a model folder. Raises CheckpointError that names it, and where it is no UTF-8."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(str(path.parent), (f"{path.name} is missing",)) from error
    except OSError as error:
        raise CheckpointError(str(path.parent), (f"{path.name} cannot be read: {error.strerror}",)) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"{path.name} is not text in UTF-8: byte {error.start}, in line {line}, is 0x{data[error.start]:02x}"
        raise CheckpointError(str(path.parent), (f"{what}; replace it by the published file",)) from error


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. Raises CheckpointError that names the file, and where it is no JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise CheckpointError(str(path.parent), (f"{path.name} is not readable JSON: {what}",)) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, or too many brackets
        raise CheckpointError(str(path.parent), (f"{path.name} is not readable JSON: {error}",)) from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path.parent), (f"{path.name} must hold a JSON object, not {type(value).__name__}",))
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Both: the JSON object of a file that must be there. Raises CheckpointError."""
    return parse_object(read_text(path), path)


def wrong_values(values: Mapping[str, Any], kinds: Kinds, file: str) -> list[str]:
    """What is wrong with entries of `values` that are there and are not null; `file` is how they are called."""
    return [
        f"{file} has {name} = {shown(values[name])}; {_NEEDED[kind]} is needed"
        for name, kind in kinds.items()
        if values.get(name) is not None and not is_kind(values[name], kind)
    ]


def is_kind(value: object, kind: Kind) -> bool:
    """Whether a value of JSON is what `kind` says; true and false are no numbers."""
    if isinstance(value, list):
        each: dict[Kind, Kind] = {"sizes": "size", "counts": "count", "names": "text", "ids": "count"}
        if kind == "numbers":
            return all(_is_number(entry) for entry in value)
        return kind in each and all(is_kind(entry, each[kind]) for entry in value)
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "text":
        return isinstance(value, str)
    if kind == "map":
        return isinstance(value, Mapping)
    if kind in ("size", "count", "ids"):
        return type(value) is int and (1 if kind == "size" else 0) <= value < _LARGEST
    if kind in ("positive", "amount"):
        return _is_number(value) and value >= 0 and (value > 0 or kind == "amount")
    return False


def shown(value: object) -> str:
    """A value for a message, not all of it where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < _LARGEST_NUMBER
