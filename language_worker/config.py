"""EngineConfig: what an operator may set about one language worker.

Owns ranges and defaults; knows nothing of checkpoints. "auto" and 0 are filled in by `engine_builder.py`
once the model's shape is known, into a new object.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kernels.quantised_matrix import QUANTIZATIONS, Quantization
from language_worker.errors import InvalidRequest

StrategyName = Literal["auto", "autoregressive", "speculative"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
KVDTypeName = Literal["auto", "int8", "fp8"]
Preemption = Literal["recompute", "swap"]

MAX_DRAFT_TOKENS = 15  # with the token before them they make a window that attention answers in a batch


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of one engine.

    dtype: "auto" takes the checkpoint's. device: "auto" takes CUDA where there is one.
    quantization: how the matrices of the model's layers are stored. "none": in dtype, or as the checkpoint has them
    quantised; "int8", "int4": in a half and a quarter of bfloat16's bytes, which bound a decode step; "int8_dynamic":
    as int8, with activations of 8 bits as well.
    num_threads: torch threads of the engine, 0 leaves torch's default.
    kv_cache_dtype: how keys and values are stored. "auto": in dtype; "int8", "fp8" (e4m3): in 8 bits with a scale for
    each head of each position, at a little more than half of bfloat16's bytes.
    batch_invariant: a token's logits have the same bits whatever shares its steps, also in bfloat16 and with
    quantisation; dense decoders on the CPU. Steps take longer.
    cuda_graphs: on a GPU, steps of few tokens that decode, verify drafts or denoise are recorded once for each size and
    replayed: fewer launches, a little more memory.
    page_size: tokens per KV page. kv_cache_tokens: capacity in tokens; 0 derives it from kv_cache_bytes,
    which itself is 0 for "512 MiB on CPU, gpu_memory_fraction of the free memory on a GPU".
    kv_buffer_tokens: positions whose KV is held in host memory between two engines: on a prefill worker until it is
    sent, on a decode worker until its request ends (a preempted one starts from it again); 0: as many as the cache.
    preemption: what becomes of the KV of a sequence that gives way when pages are lacking. "recompute": it is computed
    again; "swap": it waits in host memory, swap_tokens positions of all sequences at most (0: as many as the cache);
    what finds no room there is computed again.
    prefix_cache: keep the KV of ended sequences while pages are free, and let requests that begin alike start from it.
    max_model_len: prompt + generated tokens of one sequence; 0 takes the checkpoint's limit capped by the cache.
    max_step_tokens: query tokens in one step; max_prefill_chunk: of one sequence in one step (0: max_step_tokens).
    min_partial_chunk: tokens that a prefill whose media rows have not all arrived computes at least.
    decode_strategy: "auto" takes the model's own; "speculative" drafts up to num_draft_tokens a step from what followed
    the same words before: equal output, fewer steps where text repeats itself.
    lora: a low-rank adapter that is merged into the weights as they load: MiniMind's lora_*.pth or a folder of PEFT's;
    "": none.
    config_overrides: entries to use instead of the checkpoint's config.json, or where it says nothing.
    draft_model: folder of a small text model with the same tokenizer, which makes the drafts instead; "": none.
    max_waiting: requests that may wait before QueueFull. max_logits_bytes: cap on one request's returned logits, and
    on those of prompts (return_logits, prompt_logprobs) that a step computes, which are never above 64 MiB.
    """

    dtype: DTypeName = "auto"
    lora: str = ""
    device: str = "auto"
    quantization: Quantization = "none"
    num_threads: int = 0
    kv_cache_dtype: KVDTypeName = "auto"
    batch_invariant: bool = False
    cuda_graphs: bool = True
    page_size: int = 32
    kv_cache_tokens: int = 0
    kv_cache_bytes: int = 0
    kv_buffer_tokens: int = 0
    preemption: Preemption = "recompute"
    swap_tokens: int = 0
    gpu_memory_fraction: float = 0.85
    prefix_cache: bool = True
    max_model_len: int = 0
    max_num_seqs: int = 64
    max_step_tokens: int = 2048
    max_prefill_chunk: int = 0
    min_partial_chunk: int = 64
    decode_strategy: StrategyName = "auto"
    num_draft_tokens: int = 8
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    draft_model: str = ""
    max_waiting: int = 1024
    max_logits_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the first field that is out of range."""
        if self.dtype not in get_args(DTypeName):
            raise InvalidRequest(f"dtype is {self.dtype!r}; use one of {', '.join(get_args(DTypeName))}")
        if self.quantization not in QUANTIZATIONS:
            raise InvalidRequest(f"quantization is {self.quantization!r}; use one of {', '.join(QUANTIZATIONS)}")
        if self.decode_strategy not in get_args(StrategyName):
            known = ", ".join(get_args(StrategyName))
            raise InvalidRequest(f"decode_strategy is {self.decode_strategy!r}; use one of {known}")
        for name in ("num_threads", "kv_cache_tokens", "kv_cache_bytes", "max_model_len", "max_prefill_chunk"):
            self._require_int(name, 0)
        if self.kv_cache_dtype not in get_args(KVDTypeName):
            known = ", ".join(get_args(KVDTypeName))
            raise InvalidRequest(f"kv_cache_dtype is {self.kv_cache_dtype!r}; use one of {known}")
        if self.preemption not in get_args(Preemption):
            raise InvalidRequest(f"preemption is {self.preemption!r}; use one of {', '.join(get_args(Preemption))}")
        if self.swap_tokens and self.preemption != "swap":
            raise InvalidRequest("swap_tokens is set and preemption is 'recompute'; set preemption to 'swap'")
        self._require_int("kv_buffer_tokens", 0)
        self._require_int("swap_tokens", 0)
        for name in (
            "page_size",
            "max_num_seqs",
            "max_step_tokens",
            "min_partial_chunk",
            "max_waiting",
            "max_logits_bytes",
        ):
            self._require_int(name, 1)
        self._require_int("num_draft_tokens", 1)
        if self.num_draft_tokens > MAX_DRAFT_TOKENS:
            raise InvalidRequest(f"num_draft_tokens is {self.num_draft_tokens}; use at most {MAX_DRAFT_TOKENS}")
        if self.draft_model and self.decode_strategy == "autoregressive":
            raise InvalidRequest("draft_model is set and decode_strategy is 'autoregressive'; set it to 'speculative'")
        if not 0.0 < self.gpu_memory_fraction <= 1.0:
            raise InvalidRequest(f"gpu_memory_fraction is {self.gpu_memory_fraction}; use a value in (0, 1]")
        if self.max_step_tokens < self.max_num_seqs:
            raise InvalidRequest(
                f"max_step_tokens ({self.max_step_tokens}) is smaller than max_num_seqs ({self.max_num_seqs}); "
                "every running sequence needs one token of the step, so raise the first or lower the second"
            )

    def _require_int(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < low:
            raise InvalidRequest(f"{name} is {value!r}; use an integer of at least {low}")
