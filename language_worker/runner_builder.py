"""A ModelRunner with everything that its sequences keep: pages, host memory for those put aside, recurrent state.

Sizes come from `engine_builder.py`.
"""

from dataclasses import dataclass

import torch

from kernels.dispatch import has_triton
from kernels.quantise import LARGEST
from language_worker.config import EngineConfig
from language_worker.kv_cache import KVCache
from language_worker.models.base import LanguageModel
from language_worker.runner import ModelRunner
from language_worker.state_store import StateStore
from language_worker.step_graphs import StepGraphs, num_spare_pages


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

    def cache(num_pages: int, device: torch.device, num_spare: int = 0) -> KVCache:
        size = config.page_size
        return KVCache(
            model.spec.kv, num_pages=num_pages, page_size=size, dtype=dtypes[1], device=device, num_spare=num_spare
        )

    host = cache(size.num_swap_pages, torch.device("cpu")) if size.num_swap_pages else None
    states = StateStore.of(model.spec.state, num_slots=config.max_num_seqs, dtype=dtypes[0], device=device)
    if not _has_graphs(model, config, dtypes[1], device):
        return ModelRunner(model, cache(size.num_pages, device), device, config.num_threads, host, tile_rows, states)
    pages = cache(size.num_pages, device, num_spare_pages(config.page_size))
    graphs = StepGraphs(model, pages, device)
    return ModelRunner(model, pages, device, config.num_threads, host, graphs=graphs)


def _has_graphs(model: LanguageModel, config: EngineConfig, kv_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether small steps are recorded: those whose attention and state can be described on the device."""
    is_plain = model.spec.state is None and kv_dtype not in LARGEST
    return config.cuda_graphs and is_plain and device.type == "cuda" and has_triton()
