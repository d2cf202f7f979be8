"""Reading entries of config.json: each gives a value of the type that is needed, or says which entry is wrong and why.

What is of the wrong kind anywhere in the file was refused when it was read (`transfer/checkpoint_config.py`); here a
model says what it cannot do without, and what stands for an entry that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from language_worker.errors import ModelNotSupported
from transfer.checkpoint_json import is_kind, shown


def read_size(text: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer, `default` where the entry is null or not there; ModelNotSupported names any other."""
    value: Any = text.get(name)
    value = default if value is None else value
    if not is_kind(value, "size"):
        raise ModelNotSupported(f"config.json has {name} = {shown(value)}; a positive integer is needed")
    return int(value)


def read_count(text: Mapping[str, Any], name: str, default: int) -> int:
    """As `read_size`, and 0 is one."""
    return 0 if text.get(name) == 0 and type(text[name]) is int else read_size(text, name, default)


def read_amount(text: Mapping[str, Any], name: str, default: float) -> float:
    """A number of at least 0, `default` where the entry is not there; null is none. ModelNotSupported names it."""
    value: Any = text.get(name, default)
    if not is_kind(value, "amount"):
        raise ModelNotSupported(f"config.json has {name} = {shown(value)}; a number of at least 0 is needed")
    return float(value)


def read_theta(rope: Mapping[str, Any], text: Mapping[str, Any], default: float) -> float:
    """The base of rotary frequencies: that of the section `rope`, else config.json's, else `default`."""
    given = rope.get("rope_theta")
    given = text.get("rope_theta") if given is None else given
    if given is not None and not is_kind(given, "positive"):
        raise ModelNotSupported(f"config.json has rope_theta = {shown(given)}; a positive number is needed")
    return default if given is None else float(given)
