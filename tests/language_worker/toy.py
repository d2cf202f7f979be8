"""A toy model that sees its prefix only through physical pages, an engine around it, and the naive decoder.

Every logits row depends on every key and value of its prefix, as read through the page table: whoever hands it a wrong,
stale or half-copied page gets other tokens. It mostly follows short cycles, so that drafts are often right, and leaves
them where the prefix says so. The naive decoder computes the same from the true tokens, one sample at a time.
With recurrent state they depend on one more number, which every token takes on from where the one before left it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from language_worker.api import GenerateRequest
from language_worker.config import EngineConfig
from language_worker.decode import create_strategy
from language_worker.drafter import Drafter
from language_worker.engine import Engine
from language_worker.kv_cache import KVCache
from language_worker.limits import EngineLimits
from language_worker.models.base import (
    KVSpec,
    LanguageModel,
    ModelSpec,
    PromptPositions,
    StateSpec,
    StateTensor,
    StepInputs,
)
from language_worker.page_pool import PagePool
from language_worker.prefix_cache import PrefixCache
from language_worker.runner import ModelRunner
from language_worker.sampler import sample
from language_worker.sampling_state import SamplingState
from language_worker.scheduler import Scheduler
from language_worker.state_store import StateStore
from language_worker.swap_space import SwapSpace
from language_worker.tokenizer import Tokenizer

VOCAB = 24
MEDIA_ID = VOCAB - 1
MAX_LEN = 512
_PRIME = 1_000_003
_GENERATOR = torch.Generator().manual_seed(0)
_KEY_WEIGHTS = torch.randint(1, _PRIME, (MAX_LEN,), generator=_GENERATOR)
_VALUE_WEIGHTS = torch.randint(1, _PRIME, (MAX_LEN,), generator=_GENERATOR)
_NOISE = torch.randn(1009, VOCAB, generator=_GENERATOR) * 2


def toy_logits(values: torch.Tensor, others: torch.Tensor, count: int, window: int = 0) -> torch.Tensor:
    """Logits [count, VOCAB] of the last positions of a sequence with these keys and values [n] int64. window: how many
    of its last keys a position sees, weighted by their distance (0: all, weighted by their positions)."""
    length = values.shape[0]
    if window:
        seen = [F.pad(x, (window, 0))[-(count + window - 1) :].unfold(0, window, 1).flip(1) for x in (values, others)]
        mixed = (seen[0] * _KEY_WEIGHTS[:window] + seen[1] * _VALUE_WEIGHTS[:window]) % _PRIME
        states = mixed.sum(1) % _PRIME
    else:
        mixed = (values * _KEY_WEIGHTS[:length] + others * _VALUE_WEIGHTS[:length]) % _PRIME
        states = mixed.cumsum(0)[length - count :] % _PRIME
    logits = _NOISE[states % 1009].clone()
    follower = (values[length - count :] * 5 + 3) % 7  # cycles of length 6 at most
    logits[torch.arange(count), follower] += torch.where(states % 4 == 0, 0.0, 6.0)
    logits[:, MEDIA_ID] = -torch.inf
    return logits


class ToyModel(LanguageModel):
    """See the module. Keys hold a position's value, values hold what is derived from it and its position. window: as
    `toy_logits` has it."""

    def __init__(self, window: int = 0) -> None:
        self.spec = replace(type(self).spec, kv=replace(type(self).spec.kv, window=window))

    spec = ModelSpec(
        vocab_size=VOCAB,
        hidden_size=1,
        max_position_embeddings=MAX_LEN,
        kv=KVSpec(num_layers=1, num_kv_heads=1, head_dim=1),
        media_token_id=MEDIA_ID,
    )

    @classmethod
    def load(cls, checkpoint: Any, *, dtype: torch.dtype, device: torch.device) -> ToyModel:
        return cls()

    @classmethod
    def check(cls, checkpoint: Any) -> int:
        return 0

    @classmethod
    def read_spec(cls, config: Any) -> ModelSpec:
        return cls.spec

    def reserve_positions(self, max_len: int) -> None: ...

    def prompt_positions(self, length: int, media: Any) -> PromptPositions | None:
        return None

    def media_rows(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2]

    def forward(self, inputs: StepInputs, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        keys, values = (tensor.view(-1) for tensor in caches[0])
        size = caches[0][0].shape[1]
        own = inputs.token_ids.clone()
        for span in inputs.media:
            own[span.targets] = span.rows[:, 0].to(torch.int64)
        keys[inputs.slots] = own.float()
        values[inputs.slots] = _other(own, inputs.positions).float()
        batch, rows = inputs.attention, []
        for table, kv_len, query_len in zip(batch.page_table, batch.kv_lens, batch.query_lens, strict=True):
            slots = (table[:, None] * size + torch.arange(size)).view(-1)[:kv_len]
            rows.append(toy_logits(keys[slots].long(), values[slots].long(), query_len, self.spec.kv.window))
        logits = torch.cat(rows)
        return logits if inputs.logit_rows is None else logits[inputs.logit_rows]


class ToyDraft(ToyModel):
    """Sees media as their placeholder, knows less for sure, and is often but not always right."""

    def forward(self, inputs: StepInputs, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        logits = super().forward(inputs, caches)
        return torch.where(logits.isfinite(), logits * 0.5, -torch.inf)


class ToyRecurrent(ToyModel):
    """With state. fails_every: of the steps of several sequences one in so many raises, when their states have gone on
    (0: none)."""

    spec = replace(
        ToyModel.spec,
        state=StateSpec(num_layers=1, tensors=(StateTensor(name="sum", shape=(1,), dtype=torch.float32),)),
    )
    fails_every = 0
    num_joint = 0
    num_failed = 0

    def forward(self, inputs: StepInputs, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        logits = super().forward(replace(inputs, logit_rows=None), caches)
        values, step = caches[0][0].view(-1)[inputs.slots].long(), inputs.states
        assert step is not None
        num_single, (states,) = step.single.shape[0], step.layers[0]
        spans = [(range(i, i + 1), int(slot)) for i, slot in enumerate(step.single)]
        spans += [
            (range(num_single + tokens.start, num_single + tokens.stop), slot) for tokens, slot in step.batch.spans()
        ]
        assert sum(len(tokens) for tokens, _ in spans) == len(values)
        for tokens, slot in spans:
            for token in tokens:
                states[slot, 0] = _recurred([int(values[token])], int(states[slot, 0]))
                logits[token] += _NOISE[int(states[slot, 0])] * 0.5
        self.num_joint += len(spans) > 1
        if self.fails_every and len(spans) > 1 and self.num_joint % self.fails_every == 0:
            self.num_failed += 1
            raise RuntimeError("planted")
        return logits if inputs.logit_rows is None else logits[inputs.logit_rows]


def _recurred(values: Iterable[int], state: int = 0) -> int:
    for value in values:
        state = (state * 31 + value * 7 + 1) % 1009
    return state


def _other(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return (values * 31 + positions * 17) % 4093


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def _runner(model: LanguageModel, num_pages: int, page_size: int, swap_pages: int, num_seats: int = 1) -> ModelRunner:
    def cache(count: int) -> KVCache:
        kv = KVCache(model.spec.kv, num_pages=count, page_size=page_size, dtype=torch.float32, device=cpu)
        for tensor in kv.layers[0]:
            tensor.fill_(99_991)  # what nobody wrote must not be read
        return kv

    cpu = torch.device("cpu")
    host = cache(swap_pages) if swap_pages else None
    return ModelRunner(model, cache(num_pages), cpu, host=host, states=_states(model.spec.state, num_seats))


def _states(spec: StateSpec | None, num_seats: int) -> StateStore | None:
    if spec is None:
        return None
    states = StateStore(spec, num_slots=num_seats, dtype=torch.float32, device=torch.device("cpu"))
    states.layers[0][0].fill_(777)
    return states


def toy_engine(
    folder: Path,
    *,
    num_pages: int,
    strategy: Any = None,
    has_drafter: bool = False,
    window: int = 0,
    has_state: bool = False,
    max_logits_bytes: int = 1 << 20,
    rows: int = 64,
    **config: Any,
) -> Engine:
    """An engine of the toy with a pool of `num_pages`; folder: any model folder with a tokenizer. has_drafter: the
    strategy leaves its drafts open and a toy makes them. window: of the toys, 0 for none. swap_tokens: with
    preemption "swap", 0 for one page. has_state: the toy has recurrent state. rows: of media, at once."""
    values = EngineConfig(**{"page_size": 4, "max_num_seqs": 4, "max_step_tokens": 32, **config})
    pool = PagePool(num_pages)
    swap_pages = max(1, values.swap_tokens // values.page_size) if values.preemption == "swap" else 0
    scheduler = Scheduler(
        pool=pool,
        strategy=strategy or create_strategy("autoregressive"),
        page_size=values.page_size,
        max_num_seqs=values.max_num_seqs,
        max_step_tokens=values.max_step_tokens,
        max_prefill_chunk=values.max_prefill_chunk,
        prefix_cache=PrefixCache(pool, values.page_size, b"toy") if values.prefix_cache else None,
        has_state=has_state,
        kv_window=window,
        swap=SwapSpace(swap_pages) if swap_pages else None,
    )
    limits = EngineLimits(
        max_model_len=min(MAX_LEN, num_pages * values.page_size),
        max_waiting=values.max_waiting,
        input_buffer_tokens=rows,
        max_logits_bytes=max_logits_bytes,
        kv_buffer_tokens=values.kv_buffer_tokens or num_pages * values.page_size,
    )
    drafter = None
    if has_drafter:
        runner = _runner(ToyDraft(window), num_pages, values.page_size, swap_pages)
        drafter = Drafter(runner, vocab_size=VOCAB, num_token_ids=VOCAB)
    toy = ToyRecurrent() if has_state else ToyModel(window)
    return Engine(
        runner=_runner(toy, num_pages, values.page_size, swap_pages, values.max_num_seqs),
        scheduler=scheduler,
        tokenizer=_tokenizer(folder),
        limits=limits,
        dtype=torch.float32,
        drafter=drafter,
    )


def toy_probabilities(values: Sequence[int], temperature: float) -> np.ndarray:
    """Of the token that follows."""
    known = torch.tensor(values)
    logits = toy_logits(known, _other(known, torch.arange(len(values))), 1)[0]
    return torch.softmax(logits.double() / temperature, dim=0).numpy()


def naive(
    request: GenerateRequest,
    rows: Sequence[Sequence[int]] = (),
    *,
    max_len: int = MAX_LEN,
    window: int = 0,
    has_state: bool = False,
) -> list[list[int]]:
    """Tokens of every sample of a request with a seed, one sample and one token at a time. rows: of each media item.
    max_len: of prompt and output together."""
    params, items = request.sampling, iter(rows)
    shown, values = [], []
    for token_id in request.prompt_token_ids:
        item = list(next(items)) if token_id == MEDIA_ID else [token_id]
        shown += [token_id] * len(item)
        values += item
    limit = min(params.max_tokens or max_len, max_len - len(shown))
    options = (limit, window, has_state)
    return [_naive_sample(request, i, shown, values, *options) for i in range(params.n)]


def _naive_sample(
    request: GenerateRequest,
    index: int,
    shown: list[int],
    prompt_values: list[int],
    limit: int,
    window: int,
    has_state: bool,
) -> list[int]:
    params = request.sampling
    assert params.seed is not None and params.ignore_eos
    state = SamplingState(params, index=index, seed=params.seed, prompt=shown, stop_ids=params.stop_token_ids)
    values, tokens = list(prompt_values), []
    while len(tokens) < limit:
        known = torch.tensor(values)
        logits = toy_logits(known, _other(known, torch.arange(len(values))), 1, window)
        if has_state:
            logits += _NOISE[_recurred(values)] * 0.5
        (choice,) = sample(logits, [state])
        state.observe(choice.token_id)
        tokens.append(choice.token_id)
        values.append(choice.token_id)
        if choice.token_id in params.stop_token_ids:
            break
    return tokens
