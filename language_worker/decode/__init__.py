"""Decode strategies by name, as strings resolved on use, so that listing them imports none."""

import pkgutil

from language_worker.decode.base import DecodeStrategy
from language_worker.errors import ModelNotSupported

STRATEGIES = {
    "autoregressive": "language_worker.decode.autoregressive:Autoregressive",
}


def create_strategy(name: str) -> DecodeStrategy:
    """The strategy called `name`; ModelNotSupported when there is none."""
    if name not in STRATEGIES:
        raise ModelNotSupported(f"decode strategy {name!r} is unknown; known: {', '.join(sorted(STRATEGIES))}")
    strategy: DecodeStrategy = pkgutil.resolve_name(STRATEGIES[name])()
    return strategy
