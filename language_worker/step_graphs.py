"""StepGraphs: steps of equally many queries a sequence, recorded as CUDA graphs and replayed.

A step that decodes, or denoises a block, for a few sequences is bound by launching its kernels; a graph launches all of
them at once. A graph has fixed shapes and addresses, so there is one for each rung of a ladder of batch sizes, for each
number of queries, and for each of a few bounds on the keys of a sequence, recorded when it is needed again. What
differs from step to step is written into two tensors that the graph reads. Sequences that fill up a rung see no keys
and write theirs into pages that nobody has. All graphs write their logits to one place, and of more graphs than are
kept the one that was not used for longest is dropped: requests may ask for blocks of any length.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.recorded_batch import TILE_COLUMNS, RecordedBatch
from language_worker.kv_cache import KVCache
from language_worker.models.base import LanguageModel, StepInputs

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MAX_ROWS = BATCH_SIZES[-1]  # queries of a step; more keep the device busy for longer than launching takes
SHORTEST_BOUND = 1024  # keys; each further bound is four times the one before: how many ways keys are split among
GROWTH = 4
MOST_GRAPHS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """A sequence's part of a step: its queries, from `position` on, among `num_keys` keys that lie in `pages`.

    first: the position whose key lies first there; shift: what positions are moved by where the model counts them
    otherwise; previous: the id before the first query.
    """

    token_ids: Sequence[int]
    position: int
    num_keys: int
    pages: Sequence[int]
    first: int = 0
    shift: int = 0
    previous: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recorded:
    """tokens [4, rows] int64: ids, positions, slots, ids before. places: tiles [B, 5] and the page table [B, P], int32,
    one behind the other; staged_...: the same in page-locked host memory, which `copied` says has been read. logits
    [rows, vocab]."""

    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor
    places: torch.Tensor
    staged_tokens: torch.Tensor
    staged_places: torch.Tensor
    logits: torch.Tensor
    copied: torch.cuda.Event


class StepGraphs:
    """See the module. The cache has `num_spare_pages` at its end for what padding writes."""

    def __init__(self, model: LanguageModel, cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._cache = cache
        self._device = device
        self._recorded: dict[tuple[int, int, int], _Recorded] = {}
        self._seen: set[tuple[int, int, int]] = set()
        self._refused: set[int] = set()  # numbers of queries of which no more graphs can be recorded here
        self._pool: Any = None  # of memory, which graphs share: they run one after the other
        self._logits = torch.empty(0, device=device)  # [MAX_ROWS, vocab] once its dtype is known
        self.num_replays = 0

    def run(self, asking: Sequence[Asking]) -> torch.Tensor | None:
        """Logits of every query [rows, vocab], sequence after sequence, good until the next step; None where such a
        step is not recorded, with nothing done."""
        length = len(asking[0].token_ids) if asking else 0
        is_even = all(len(one.token_ids) == length for one in asking)
        if not is_even or not 0 < len(asking) * length <= MAX_ROWS:
            return None
        rung = next((size for size in BATCH_SIZES if size >= len(asking) and size * length <= MAX_ROWS), len(asking))
        bound = SHORTEST_BOUND
        while bound < max(one.num_keys for one in asking):
            bound *= GROWTH
        kind = rung, length, bound
        if kind not in self._recorded and (length in self._refused or self._is_first(kind)):
            return None
        with torch.cuda.device(self._device):  # whose stream is recorded, and waited for
            recorded = self._recorded.pop(kind, None)
            if recorded is None:
                try:
                    recorded = self._record(rung, length, bound)
                except RuntimeError as error:
                    self._refused.add(length)
                    logger.warning("steps of %d tokens are not recorded as CUDA graphs: %s", length, error)
                    return None
            self._recorded[kind] = recorded  # behind all others
            self._fill(recorded, asking, length)
            recorded.graph.replay()
        self.num_replays += 1
        return recorded.logits[: len(asking) * length]

    def _is_first(self, kind: tuple[int, int, int]) -> bool:
        """Whether such a step was not asked for before, as far as is remembered: what comes once is not recorded."""
        if kind in self._seen:
            return False
        if len(self._seen) >= MOST_GRAPHS:
            self._seen.clear()
        self._seen.add(kind)
        return True

    def _record(self, rung: int, length: int, bound: int) -> _Recorded:
        while len(self._recorded) >= MOST_GRAPHS:
            torch.cuda.synchronize(self._device)  # it may still run
            del self._recorded[next(iter(self._recorded))]
        num_rows, num_pages = rung * length, -(-bound // self._cache.page_size)
        tokens = torch.zeros((4, num_rows), dtype=torch.int64).pin_memory()
        places = torch.zeros(rung * (TILE_COLUMNS + num_pages), dtype=torch.int32).pin_memory()
        self._pad(tokens, places, rung, 0)
        there = tokens.to(self._device), places.to(self._device)
        tiles, table = _parts(there[1], rung)
        inputs = StepInputs(
            token_ids=there[0][0],
            positions=there[0][1],
            slots=there[0][2],
            attention=RecordedBatch(tiles, table, bound, length),
            media=(),
            logit_rows=None,
            previous_ids=there[0][3] if self._model.spec.needs_previous_ids else None,
        )
        logits = self._model.forward(inputs, self._cache.layers)  # what is compiled or allocated once is not recorded
        if not len(self._logits):
            self._logits = logits.new_empty(MAX_ROWS, logits.shape[1])
        logits = self._logits[:num_rows]
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # other threads of this process copy rows of media meanwhile: that is no business of this graph
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits.copy_(self._model.forward(inputs, self._cache.layers))
        return _Recorded(
            graph=graph,
            tokens=there[0],
            places=there[1],
            staged_tokens=tokens,
            staged_places=places,
            logits=logits,
            copied=torch.cuda.Event(),  # type: ignore[no-untyped-call]
        )

    def _fill(self, recorded: _Recorded, asking: Sequence[Asking], length: int) -> None:
        """What this step reads."""
        recorded.copied.synchronize()
        rung, size = recorded.tokens.shape[1] // length, self._cache.page_size
        self._pad(recorded.staged_tokens, recorded.staged_places, rung, len(asking))
        tokens = recorded.staged_tokens.numpy()
        tiles, table = (part.numpy() for part in _parts(recorded.staged_places, rung))
        for i, one in enumerate(asking):
            own = range(one.position - one.first, one.position - one.first + length)
            rows = slice(i * length, (i + 1) * length)
            tokens[0, rows] = one.token_ids
            tokens[1, rows] = range(one.position + one.shift, one.position + one.shift + length)
            tokens[2, rows] = [one.pages[place // size] * size + place % size for place in own]
            tokens[3, rows] = one.previous, *one.token_ids[:-1]
            tiles[i] = i * length, length, own.start, one.num_keys, i
            pages = one.pages[: -(-one.num_keys // size)]
            table[i, : len(pages)] = pages
        recorded.tokens.copy_(recorded.staged_tokens, non_blocking=True)
        recorded.places.copy_(recorded.staged_places, non_blocking=True)
        recorded.copied.record()

    def _pad(self, tokens: torch.Tensor, places: torch.Tensor, rung: int, count: int) -> None:
        """Sequences behind the first `count` are padding."""
        num_rows = tokens.shape[1]
        length, spare = num_rows // rung, self._cache.num_pages * self._cache.page_size
        tokens[:2, count * length :] = 0
        tokens[2, count * length :] = torch.arange(spare + count * length, spare + num_rows)
        padding = torch.arange(count, rung)
        tiles, _ = _parts(places, rung)
        tiles[count:] = 0
        tiles[count:, 0], tiles[count:, 1], tiles[count:, 4] = padding * length, length, padding


def num_spare_pages(page_size: int) -> int:
    """Pages behind the cache's that padding may write to."""
    return -(-MAX_ROWS // page_size)


def _parts(places: torch.Tensor, rung: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles [rung, 5] and page table [rung, P]: views of `places`."""
    end = rung * TILE_COLUMNS
    return places[:end].view(rung, TILE_COLUMNS), places[end:].view(rung, -1)
