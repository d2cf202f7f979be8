"""Decode strategies by name, as strings resolved on use, so that listing them imports none."""

import pkgutil

from language_worker.decode.base import DecodeStrategy
from language_worker.decode.drafts import OpenDrafts
from language_worker.errors import ModelNotSupported

STRATEGIES = {
    "autoregressive": "language_worker.decode.autoregressive:Autoregressive",
    "block_diffusion": "language_worker.decode.block_diffusion:BlockDiffusion",
    "speculative": "language_worker.decode.speculative:Speculative",
}
DRAFTING = frozenset({"speculative"})


def create_strategy(name: str, *, num_draft_tokens: int = 8, has_drafter: bool = False) -> DecodeStrategy:
    """The strategy called `name`; ModelNotSupported when there is none. num_draft_tokens: for those that draft.
    has_drafter: a draft model makes the drafts, the strategy only keeps places for them."""
    if name not in STRATEGIES:
        raise ModelNotSupported(f"decode strategy {name!r} is unknown; known: {', '.join(sorted(STRATEGIES))}")
    kind = pkgutil.resolve_name(STRATEGIES[name])
    values = (num_draft_tokens, *((OpenDrafts,) if has_drafter else ())) if name in DRAFTING else ()
    strategy: DecodeStrategy = kind(*values)
    return strategy
