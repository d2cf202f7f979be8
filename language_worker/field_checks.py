"""Checks of single fields that came from outside: InvalidRequest that names the field, shows what it holds and says
what it may hold."""

from collections.abc import Mapping
from typing import Any

from language_worker.errors import InvalidRequest

MAX_INT = 2**31 - 1  # of counts and token ids: what every tensor, and every field of the wire, can hold


def require_map(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be a map, not {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """For a message; Python refuses to print integers of many thousand digits."""
    return "a huge number" if type(value) is int and abs(value) >= 10**30 else repr(value)


def check_int(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(f"{name} is {shown(value)}; use an integer in {low}..{high}")


def check_ids(name: str, value: object, most: int) -> None:
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(f"{name} is {value!r}; use a list of token ids")
    if len(value) > most:
        raise InvalidRequest(f"{name} has {len(value)} entries; at most {most} are allowed")
    for token_id in value:
        check_int(f"{name} entry", token_id, 0, MAX_INT)


def check_number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    ok = type(value) in (int, float) and low <= value <= high  # type: ignore[operator]
    if not ok or (low_open and value == low):
        raise InvalidRequest(
            f"{name} is {shown(value)}; use a number {'above' if low_open else 'from'} {low:g} to {high:g}"
        )
