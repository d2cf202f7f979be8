"""A ModelRunner with everything that its sequences keep: pages, host memory for those put aside, recurrent state.

Sizes come from `engine_builder.py`.
"""

from dataclasses import dataclass

import torch

from language_worker.config import EngineConfig
from language_worker.kv_cache import KVCache
from language_worker.models.base import LanguageModel
from language_worker.runner import ModelRunner
from language_worker.state_store import StateStore


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSize:
    """num_pages of the KV cache, the longest sequence that is served with it, and pages in host memory for the KV of
    preempted sequences."""

    num_pages: int
    max_model_len: int
    num_swap_pages: int = 0


def create_runner(
    model: LanguageModel,
    config: EngineConfig,
    size: CacheSize,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    tile_rows: int,
) -> ModelRunner:
    """With caches of its own. dtypes: of the model and of its keys and values."""
    model.reserve_positions(size.max_model_len)

    def cache(num_pages: int, device: torch.device) -> KVCache:
        return KVCache(model.spec.kv, num_pages=num_pages, page_size=config.page_size, dtype=dtypes[1], device=device)

    host = cache(size.num_swap_pages, torch.device("cpu")) if size.num_swap_pages else None
    states = StateStore.of(model.spec.state, num_slots=config.max_num_seqs, dtype=dtypes[0], device=device)
    return ModelRunner(model, cache(size.num_pages, device), device, config.num_threads, host, tile_rows, states)
