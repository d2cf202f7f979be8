"""From a model folder and an EngineConfig to a running Engine: devices, dtypes, cache sizes, and the parts joined.

The only place of this half that resolves "auto". Knows no transport.
"""

import json
import logging
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import torch

from kernels.machine import find_device
from kernels.quantised_matrix import Quantization
from language_worker.config import EngineConfig
from language_worker.decode import create_strategy
from language_worker.decode.base import DecodeStrategy
from language_worker.denoiser import Denoiser
from language_worker.drafter import Drafter
from language_worker.engine import Engine
from language_worker.errors import ModelNotSupported
from language_worker.handover.identity import kv_identity
from language_worker.handover.rows import media_rows, state_rows
from language_worker.limits import EngineLimits
from language_worker.lora import AdaptedCheckpoint
from language_worker.machine_limits import require_memory, require_threads
from language_worker.models import open_model, resolve_model
from language_worker.models.base import LanguageModel, ModelSpec
from language_worker.models.decoder import Decoder
from language_worker.models.windows import kept_by_all
from language_worker.page_pool import PagePool
from language_worker.prefix_cache import DIGEST_BYTES, PrefixCache
from language_worker.runner import ModelRunner
from language_worker.runner_builder import CacheSize, create_runner
from language_worker.scheduler import Scheduler
from language_worker.swap_space import SwapSpace
from language_worker.tokenizer import Tokenizer
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_dtype import checkpoint_dtype

logger = logging.getLogger(__name__)

CPU_CACHE_BYTES = 512 << 20
STEP_LOGITS_BYTES = 64 << 20  # of the prompt logits that one step may compute: others wait meanwhile
BY_DEVICE = "by device"  # what a layout says whose tensors are of several dtypes
KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_engine(
    model_path: str | Path,
    config: EngineConfig,
    *,
    input_buffer_tokens: int = 262144,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """Load the text half of the checkpoint and join the parts.

    Raises ModelNotSupported, transfer.checkpoint.CheckpointError, or InvalidRequest for a config that cannot hold.
    """
    require_threads(config)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    opened = open_model(model_path, config.config_overrides)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, opened, device)
    checkpoint = AdaptedCheckpoint.of(opened, config.lora) if config.lora else opened
    model = _load_model(checkpoint, config.quantization, dtype, device)
    tokenizer = Tokenizer(model_path)
    draft_model = _load_draft_model(config, tokenizer, dtype, device) if config.draft_model else None
    kv_dtype = resolve_kv_dtype(config, model.spec, dtype)
    size = resolve_cache(config, model.spec, kv_dtype, device, None if draft_model is None else draft_model.spec)

    def runner_of(model: LanguageModel, tile_rows: int = 0) -> ModelRunner:
        return create_runner(model, config, size, (dtype, kv_dtype), device, tile_rows)

    runner = runner_of(model, _tile_rows(model, device) if config.batch_invariant else 0)
    num_positions = size.num_pages * config.page_size
    models = [model, *([] if draft_model is None else [draft_model])]  # over the same pages
    kv_window = kept_by_all(tuple(one.spec.kv.window for one in models))
    scheduler = _scheduler(config, model.spec, size, _cache_root(checkpoint, dtype, config.page_size), kv_window)
    return Engine(
        runner=runner,
        denoiser=_denoiser(runner, tokenizer) if scheduler.strategy.is_whole else None,
        drafter=None
        if draft_model is None
        else Drafter(runner_of(draft_model), vocab_size=model.spec.vocab_size, num_token_ids=tokenizer.vocab_size),
        scheduler=scheduler,
        tokenizer=tokenizer,
        limits=EngineLimits(
            max_model_len=size.max_model_len,
            max_waiting=config.max_waiting,
            input_buffer_tokens=input_buffer_tokens,
            max_logits_bytes=config.max_logits_bytes,
            kv_buffer_tokens=config.kv_buffer_tokens
            or num_positions
            + config.max_num_seqs * state_rows(model.spec, kv_dtype)
            + media_rows(model.spec, dtype, kv_dtype, num_positions),
        ),
        dtype=dtype,
        clock=clock,
        kv_of=kv_identity(checkpoint, model, quantization=config.quantization, dtype=dtype, kv_dtype=kv_dtype),
    )


def _denoiser(runner: ModelRunner, tokenizer: Tokenizer) -> Denoiser:
    return Denoiser(
        runner,
        eos_ids=tokenizer.eos_token_ids,
        num_token_ids=tokenizer.vocab_size,
        never_ids=tokenizer.special_ids(runner.model.spec.unspoken),
    )


def _load_model(
    checkpoint: Checkpoint, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """The checkpoint's text half, with all of its adapter. ModelNotSupported for a family that is not quantised."""
    kind = _resolve_served(checkpoint, quantization)
    with torch.inference_mode():
        if quantization == "none" or not issubclass(kind, Decoder):
            model = kind.load(checkpoint, dtype=dtype, device=device)
        else:
            model = kind.load(checkpoint, dtype=dtype, device=device, quantization=quantization)
    if isinstance(checkpoint, AdaptedCheckpoint):
        checkpoint.require_used()
    return model


def _resolve_served(checkpoint: Checkpoint, quantization: Quantization) -> type[LanguageModel]:
    kind = resolve_model(checkpoint.config())
    if quantization != "none" and not issubclass(kind, Decoder):
        raise ModelNotSupported(f"quantization {quantization!r} is not served for {kind.__name__}; use 'none'")
    if quantization != "none" and checkpoint.grouped:
        raise ModelNotSupported(
            f"quantization is {quantization!r}, and the checkpoint's weights are stored quantised; set it to 'none', "
            "or take the original checkpoint"
        )
    return kind


def _tile_rows(model: LanguageModel, device: torch.device) -> int:
    """Of batch-invariant steps. ModelNotSupported where those are not served."""
    if not isinstance(model, Decoder) or device.type != "cpu":
        raise ModelNotSupported(
            f"batch_invariant is served for dense decoders on the CPU, not for {type(model).__name__} on {device.type}"
        )
    return model.tile_rows()


def _scheduler(config: EngineConfig, spec: ModelSpec, size: CacheSize, root: bytes, kv_window: int) -> Scheduler:
    """Over a pool of its own. What is computed whole needs steps that hold it, and has no KV that others could use."""
    pool, strategy = PagePool(size.num_pages), _strategy(config, spec)
    has_prefixes = config.prefix_cache and not strategy.is_whole and spec.state is None
    if config.prefix_cache and spec.state is not None:
        logger.info("the prefix cache is off: this model's pages are of no use without the recurrent state behind them")
    return Scheduler(
        pool=pool,
        strategy=strategy,
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=max(config.max_step_tokens, size.max_model_len if strategy.is_whole else 0),
        max_prefill_chunk=0 if strategy.is_whole else config.max_prefill_chunk,
        max_prompt_logits=max(1, min(config.max_logits_bytes, STEP_LOGITS_BYTES) // (4 * spec.vocab_size)),
        prefix_cache=PrefixCache(pool, config.page_size, root) if has_prefixes else None,
        min_partial_chunk=config.min_partial_chunk,
        has_state=spec.state is not None,
        kv_window=kv_window,
        swap=SwapSpace(size.num_swap_pages) if size.num_swap_pages else None,
    )


def _load_draft_model(
    config: EngineConfig, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """The small model, in the large one's dtype. Raises as `build_engine` does; ModelNotSupported for other tokens."""
    if not Tokenizer(config.draft_model).has_ids_of(tokenizer):
        raise ModelNotSupported(
            f"draft model {config.draft_model} has another tokenizer than the model; use a smaller one of its family"
        )
    model = _load_model(open_model(config.draft_model), "none", dtype, device)
    if model.spec.mask_token_id is not None:
        raise ModelNotSupported(
            f"draft model {config.draft_model} fills in masks and predicts no next token, which drafts are; use one "
            "that writes its tokens one by one"
        )
    if model.spec.state is not None:
        raise ModelNotSupported(
            f"draft model {config.draft_model} keeps recurrent state, which cannot go back over a wrong draft"
        )
    if model.spec.needs_previous_ids:
        raise ModelNotSupported(
            f"draft model {config.draft_model} reads the token before each of its own, which drafts cannot offer"
        )
    if model.spec.vocab_size < tokenizer.vocab_size:
        raise ModelNotSupported(
            f"draft model {config.draft_model} knows {model.spec.vocab_size} token ids of {tokenizer.vocab_size}"
        )
    return model


def _strategy(config: EngineConfig, spec: ModelSpec) -> DecodeStrategy:
    name = spec.decode_strategy if config.decode_strategy == "auto" else config.decode_strategy
    has_drafter = bool(config.draft_model)
    if spec.decode_strategy == "block_diffusion" and (name != spec.decode_strategy or has_drafter):
        raise ModelNotSupported(
            "this model fills in masks and knows no other order; set decode_strategy to 'auto' and no draft_model"
        )
    if spec.state is not None and (name == "speculative" or has_drafter):
        raise ModelNotSupported(
            "this model keeps recurrent state, which cannot go back over a wrong draft; set decode_strategy to 'auto' "
            "and no draft_model"
        )
    return create_strategy(
        "speculative" if has_drafter else name, num_draft_tokens=config.num_draft_tokens, has_drafter=has_drafter
    )


def check_model(model_path: str | Path, config: EngineConfig) -> int:
    """What `build_engine` would say of the tensors, from their headers and the adapter; returns how many it reads."""
    require_threads(config)
    checkpoint = open_model(model_path, config.config_overrides)
    dtype = resolve_dtype(config.dtype, checkpoint)
    kind = _resolve_served(checkpoint, config.quantization)
    num_tensors = kind.check(checkpoint)
    spec = kind.read_spec(checkpoint.config())
    resolve_kv_dtype(config, spec, dtype)
    _strategy(config, spec)
    if config.lora:
        AdaptedCheckpoint.of(checkpoint, config.lora)
    return num_tensors


def resolve_device(name: str) -> torch.device:
    """ "auto": the first CUDA device, else the CPU. ModelNotSupported for what is not here."""
    try:
        return find_device(name)
    except ValueError as error:
        raise ModelNotSupported(str(error)) from error


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device | None = None) -> torch.dtype:
    """ "auto": the checkpoint's own; of one that mixes several by design, bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = checkpoint_dtype(checkpoint)
    if name == BY_DEVICE:
        name = "bfloat16" if device is not None and device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise ModelNotSupported(f"dtype {name!r} is not served; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_kv_dtype(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are stored in. ModelNotSupported for a model whose KV is not kept in 8 bits, or not apart
    from the cache."""
    if config.kv_cache_dtype != "auto" and spec.decode_strategy == "block_diffusion":
        raise ModelNotSupported(
            f"kv_cache_dtype {config.kv_cache_dtype!r} is not served for models that fill in masks, whose KV is "
            "computed again and again; use 'auto'"
        )
    if config.preemption == "swap" and spec.decode_strategy == "block_diffusion":
        raise ModelNotSupported(
            "preemption 'swap' has no effect for models that fill in masks, which are never preempted once they have "
            "begun; use 'recompute'"
        )
    if spec.state is not None and (config.kv_cache_dtype != "auto" or config.preemption == "swap"):
        raise ModelNotSupported(
            "this model keeps recurrent state: set kv_cache_dtype to 'auto' and preemption to 'recompute'"
        )
    return KV_DTYPES.get(config.kv_cache_dtype, dtype)


def resolve_cache(
    config: EngineConfig, spec: ModelSpec, kv_dtype: torch.dtype, device: torch.device, draft: ModelSpec | None = None
) -> CacheSize:
    """Pages of the cache: what was asked for, or what the memory budget gives, at most what all seats could use.

    draft: of the draft model, whose cache has as many pages and comes out of the same budget.
    """
    default_len = spec.default_model_len or spec.max_position_embeddings
    wanted_len = min(config.max_model_len or default_len, spec.max_position_embeddings)
    if config.max_model_len > spec.max_position_embeddings:
        raise ModelNotSupported(
            f"max_model_len {config.max_model_len} exceeds the checkpoint's {spec.max_position_embeddings} positions"
        )
    tokens = config.kv_cache_tokens
    per_token = spec.kv.bytes_per_token(kv_dtype) + (0 if draft is None else draft.kv.bytes_per_token(kv_dtype))
    if not tokens:
        num_bytes = config.kv_cache_bytes or _default_bytes(config, device)
        if spec.state is not None and device.type == "cuda" and not config.kv_cache_bytes:
            num_bytes -= config.max_num_seqs * spec.state.num_bytes(kv_dtype)
        seats = config.max_num_seqs * (wanted_len + config.page_size)
        tokens = min(num_bytes // per_token, seats)
    num_pages = tokens // config.page_size if not config.kv_cache_tokens else -(-tokens // config.page_size)
    if num_pages * config.page_size < 2:
        raise ModelNotSupported(
            f"the KV cache would hold {max(num_pages, 0)} pages of {config.page_size} tokens; raise kv_cache_bytes"
        )
    setting = "kv_cache_tokens" if config.kv_cache_tokens else "kv_cache_bytes"
    require_memory("a KV cache", num_pages * config.page_size, per_token, device, setting)
    max_model_len = min(wanted_len, num_pages * config.page_size)
    if config.max_model_len > max_model_len:
        raise ModelNotSupported(
            f"max_model_len {config.max_model_len} does not fit the KV cache of {num_pages * config.page_size} tokens; "
            "raise kv_cache_tokens or kv_cache_bytes, or lower max_model_len"
        )
    num_swap_pages = 0
    if config.preemption == "swap":
        num_swap_pages = -(-config.swap_tokens // config.page_size) or num_pages
        num_bytes, setting = spec.kv.bytes_per_token(kv_dtype), "swap_tokens, or kv_cache_tokens where that is 0"
        host = torch.device("cpu")
        require_memory("the KV put aside", num_swap_pages * config.page_size, num_bytes, host, setting)
    return CacheSize(num_pages=num_pages, max_model_len=max_model_len, num_swap_pages=num_swap_pages)


def _cache_root(checkpoint: Checkpoint, dtype: torch.dtype, page_size: int) -> bytes:
    """Digest of what besides tokens and media decides a page's KV. Weights count by name and shape only: the cache
    never leaves the engine that loaded them."""
    tensors = sorted((t.name, tuple(t.shape), str(t.dtype)) for t in checkpoint.tensors.values())
    described = json.dumps([checkpoint.config(), tensors, str(dtype), page_size], sort_keys=True)
    return blake2b(described.encode(), digest_size=DIGEST_BYTES).digest()


def _default_bytes(config: EngineConfig, device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * config.gpu_memory_fraction)
