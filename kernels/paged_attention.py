"""Attention of query windows over a paged cache.

Each sequence of a step asks with its last `query_len` positions, and sees those of its `kv_len` positions that the mask
allows: all up to its own unless told otherwise.
Short windows (decode, small drafts) are answered together: by the C twin where the keys lie, else those of equal length
over gathered slots. A long window (prefill) is answered alone. What is the same for all layers of a step (gather
indices, masks) is computed once and kept in the batch.
Slots that no sequence owns are never read, whatever they hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from kernels._native.limits import MAX_HEAD_DIM
from kernels.attention_mask import BIDIRECTIONAL, CAUSAL, AttentionMask
from kernels.dispatch import attention_twin, native
from kernels.invariance import is_batch_invariant
from kernels.long_window import Piece, long_window, pieces_of
from kernels.pages import kv_slots
from kernels.quantised_pages import KVPages, LivePages, QuantisedPages

SHORT_WINDOW = 16  # longest window that is answered in a padded group
PADDING_RATIO = 2  # in a group, no key length exceeds the shortest by more than this factor...
PADDING_FLOOR = 64  # ...except below this length, where padding costs less than another call


@dataclasses.dataclass(kw_only=True, slots=True)
class AttentionBatch:
    """Who asks for what in one step: page_table [S, P] integer on the CPU, and per sequence the number of query
    tokens, the number of positions with keys and values (this step's included), and the first row in `q`.

    `prepare` is called by the first layer if the engine did not.
    """

    page_table: torch.Tensor
    query_lens: Sequence[int]
    kv_lens: Sequence[int]
    query_start: Sequence[int]
    _plans: dict[Any, _Plan] = dataclasses.field(default_factory=dict)  # by keys that a query sees, heads and dtype
    _slots: list[slice | torch.Tensor] | None = None  # of each sequence's keys, where all of them are seen
    _tiles: dict[Any, Any] = dataclasses.field(default_factory=dict)  # what the Triton path prepared, by heads
    _each: AttentionBatch | None = None  # the same queries, one by one
    _are_alone: bool = False
    _short: tuple[_SmallWindows | None] | None = None  # all windows, where a C path may answer them
    _live: tuple[LivePages, AttentionBatch] | None = None  # over quantised pages: those in use, and the batch on them

    def prepare(
        self,
        window: int = 0,
        *,
        page_size: int,
        heads_per_key: int,
        dtype: torch.dtype,
        device: torch.device,
        in_c: bool = False,
    ) -> _Plan:
        """Compute gather indices and masks for all layers whose queries see `window` keys, their own the last (0: all);
        keys that no query sees are not gathered. `heads_per_key`: query heads per key head. in_c: whether the C path
        answers the short windows.

        Raises ValueError when the lengths contradict each other or the page table.
        """
        kind = window, heads_per_key, dtype
        if kind not in self._plans:
            self.check(page_size)
            small = _SmallWindows.build(self) if in_c else None
            seen = list(self.kv_lens)
            if window:
                seen = [min(kv, asked + window - 1) for asked, kv in zip(self.query_lens, self.kv_lens, strict=True)]
            groups = _group(self.query_lens, seen, with_short=small is None)
            if self._are_alone:
                groups = [[i] for group in groups for i in group]
            self._plans[kind] = _Plan(
                groups=tuple(
                    _Group.build(self, members, page_size, heads_per_key, dtype, device, window) for members in groups
                ),
                small=small,
            )
        return self._plans[kind]

    def short_windows(self, page_size: int) -> _SmallWindows | None:
        """All windows for a C path, where all are short. Raises ValueError as `prepare` does."""
        if max(self.query_lens, default=SHORT_WINDOW + 1) > SHORT_WINDOW:
            return None
        if self._short is None:
            self.check(page_size)
            self._short = (_SmallWindows.build(self),)
        return self._short[0]

    def tiles(self, triton: ModuleType, q: torch.Tensor, page_size: int, heads_per_key: int) -> tuple[Any, Any]:
        """(tiles, shape) of the Triton path for all layers of such heads. Raises ValueError as `prepare` does."""
        kind = heads_per_key, q.shape[-1], q.element_size()
        if kind not in self._tiles:
            self.check(page_size)
            shape = triton.shape_for(heads_per_key, q.shape[-1], max(self.query_lens, default=1), q.element_size())
            tiles = triton.plan(
                self.page_table, self.query_lens, self.kv_lens, self.query_start, shape, heads_per_key, q.device
            )
            self._tiles[kind] = tiles, shape
        return self._tiles[kind]  # type: ignore[no-any-return]

    def live(self, page_size: int, device: torch.device) -> tuple[LivePages, AttentionBatch]:
        """The pages in use, and this batch over a cache of nothing else. Raises ValueError as `prepare` does."""
        if self._live is None:
            self.check(page_size)
            pages = LivePages.of(self.page_table, self.kv_lens, page_size, device)
            self._live = (
                pages,
                AttentionBatch(
                    page_table=pages.page_table,
                    query_lens=self.query_lens,
                    kv_lens=self.kv_lens,
                    query_start=self.query_start,
                ),
            )
        return self._live

    def each(self, page_size: int) -> AttentionBatch:
        """The same queries, each answered alone: so its answer depends on its own keys and on nothing else. Raises
        ValueError as `prepare` does."""
        if self._each is None:
            self.check(page_size)
            asked = list(zip(self.query_lens, self.kv_lens, self.query_start, strict=True))
            self._each = AttentionBatch(
                page_table=self.page_table.repeat_interleave(torch.tensor(list(self.query_lens)), dim=0),
                query_lens=[1] * sum(self.query_lens),
                kv_lens=[kv - length + 1 + i for length, kv, _ in asked for i in range(length)],
                query_start=[start + i for length, _, start in asked for i in range(length)],
                _are_alone=True,
            )
        return self._each

    def check(self, page_size: int) -> None:
        """Raise ValueError when the lengths contradict each other or the page table."""
        room = self.page_table.shape[1] * page_size
        if not len(self.query_lens) == len(self.kv_lens) == len(self.query_start) == self.page_table.shape[0]:
            raise ValueError("attention batch: page_table, query_lens, kv_lens and query_start differ in length")
        for i, (queries, kv) in enumerate(zip(self.query_lens, self.kv_lens, strict=True)):
            if not 0 < queries <= kv <= room:
                raise ValueError(
                    f"attention batch: sequence {i} asks {queries} positions of {kv}, its page table row holds {room}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """How a batch is answered: its windows in groups, but for those that the C path takes."""

    groups: tuple[_Group, ...]
    small: _SmallWindows | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Sequences answered in one call.

    rows: query rows, a slice when they are neighbours, else [n * query_len]; slots: [n * max_kv], or a slice when the
    only sequence lies in neighbouring pages; mask: additive, in the query's dtype, None when all see everything;
    pieces: how a long window is answered, none for short ones.
    """

    rows: slice | torch.Tensor
    slots: slice | torch.Tensor
    count: int
    query_len: int
    max_kv: int
    mask: torch.Tensor | None
    pieces: tuple[Piece, ...]

    @classmethod
    def build(
        cls,
        batch: AttentionBatch,
        members: list[int],
        page_size: int,
        heads_per_key: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int = 0,
    ) -> _Group:
        """window: keys that a query sees, its own the last (0: all); those that no query sees are left out."""
        query_len = batch.query_lens[members[0]]
        firsts = [max(0, batch.kv_lens[i] - query_len - window + 1) if window else 0 for i in members]
        kv_lens = [batch.kv_lens[i] - first for i, first in zip(members, firsts, strict=True)]
        max_kv = max(kv_lens)
        is_long = query_len > SHORT_WINDOW
        mask = None if is_long else _padded_mask(query_len, kv_lens, heads_per_key, dtype, window)
        slots = _gather_slots(batch.page_table, members, kv_lens, page_size, firsts)
        rows = _query_rows([batch.query_start[i] for i in members], query_len)
        return cls(
            rows=rows if isinstance(rows, slice) else rows.to(device),
            slots=slots if isinstance(slots, slice) else slots.to(device),
            count=len(members),
            query_len=query_len,
            max_kv=max_kv,
            mask=None if mask is None else mask.to(device),
            pieces=pieces_of(query_len, max_kv, window, dtype, device) if is_long else (),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _SmallWindows:
    """The short windows of a step for the C path: page_table [S, P] and windows [3, S] (query lengths, key lengths,
    first rows), int64."""

    page_table: torch.Tensor
    windows: torch.Tensor

    @classmethod
    def build(cls, batch: AttentionBatch) -> _SmallWindows | None:
        """None when there are none."""
        short = [i for i, length in enumerate(batch.query_lens) if length <= SHORT_WINDOW]
        if not short:
            return None
        columns = (batch.query_lens, batch.kv_lens, batch.query_start)
        if len(short) < len(batch.query_lens):
            return cls(
                page_table=batch.page_table[short].to(torch.int64),
                windows=torch.tensor([[column[i] for i in short] for column in columns]),
            )
        return cls(page_table=batch.page_table.to(torch.int64).contiguous(), windows=torch.tensor(columns))


def paged_attention(
    q: torch.Tensor,
    k_cache: KVPages,
    v_cache: KVPages,
    batch: AttentionBatch,
    scale: float | None = None,
    *,
    mask: AttentionMask = CAUSAL,
    softcap: float | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every window over its sequence's pages.

    q: [T, H, D]; k_cache, v_cache: [num_pages, page_size, Hk, D] contiguous, both plain or both quantised, H a multiple
    of Hk; this step's keys and values are already written. scale: default `1 / sqrt(D)`. softcap: scores become
    `softcap * tanh(score / softcap)`. lse: [T, H] float32, filled with each query's log-sum-exp of scores (-inf where
    it sees nothing).
    Returns [T, H, D] like `q`; a query that sees nothing gives zeros.
    Raises ValueError when the batch is inconsistent (first layer only).
    """
    if isinstance(k_cache, QuantisedPages) and isinstance(v_cache, QuantisedPages):
        live, batch = batch.live(k_cache.shape[1], q.device)
        k_cache, v_cache = k_cache.read(live, q.dtype), v_cache.read(live, q.dtype)
    assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
    num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
    if is_batch_invariant() and mask.block_length == 1:
        batch = batch.each(page_size)
    heads_per_key = q.shape[1] // num_kv_heads
    if mask.window and mask.window >= max(batch.kv_lens, default=0):  # it hides nothing: as layers without one
        mask = AttentionMask(block_length=mask.block_length)
    triton = attention_twin("paged_attention", q)
    if triton is not None:
        tiles, shape = batch.tiles(triton, q, page_size, heads_per_key)
        out: torch.Tensor = triton.paged_attention(
            q, k_cache, v_cache, tiles, shape, scale, mask=mask, softcap=softcap, lse=lse
        )
        return out
    k_flat = k_cache.view(num_pages * page_size, num_kv_heads, head_dim)
    v_flat = v_cache.view(num_pages * page_size, num_kv_heads, head_dim)
    if mask == BIDIRECTIONAL and softcap is None and lse is None:
        return _unmasked(q, k_flat, v_flat, batch, page_size, scale)
    if mask.block_length != 1 or softcap is not None or lse is not None:
        batch.check(page_size)
        return _by_definition(q, k_flat, v_flat, batch, page_size, scale, mask, softcap, lse)
    quick = native("paged_attention", q, q.numel()) if head_dim <= MAX_HEAD_DIM else None
    plan = batch.prepare(
        mask.window,
        page_size=page_size,
        heads_per_key=heads_per_key,
        dtype=q.dtype,
        device=q.device,
        in_c=quick is not None,
    )
    groups, small = plan.groups, plan.small
    if small is None and len(groups) == 1 and isinstance(groups[0].rows, slice):
        return _answer(q, k_flat, v_flat, groups[0], scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if quick is not None and small is not None:
        scale = 1 / math.sqrt(head_dim) if scale is None else scale
        quick.paged_attention(q, k_cache, v_cache, small.page_table, small.windows, scale, out, mask.window)
    for group in groups:
        out[group.rows] = _answer(q[group.rows], k_flat, v_flat, group, scale)
    return out


def _unmasked(
    q: torch.Tensor,
    k_flat: torch.Tensor,
    v_flat: torch.Tensor,
    batch: AttentionBatch,
    page_size: int,
    scale: float | None,
) -> torch.Tensor:
    """Every query sees every key of its sequence, wherever in it the window lies. One sequence at a time: where keys
    are gathered for the first layer is kept for the others."""
    if batch._slots is None:
        batch.check(page_size)
        batch._slots = [
            slots if isinstance(slots, slice) else slots.to(q.device)
            for slots in (
                _gather_slots(batch.page_table, [i], [kv_len], page_size, [0]) for i, kv_len in enumerate(batch.kv_lens)
            )
        ]
    num_kv_heads, head_dim = k_flat.shape[1:]
    out = torch.empty_like(q)
    for start, length, slots in zip(batch.query_start, batch.query_lens, batch._slots, strict=True):
        k, v = k_flat[slots], v_flat[slots]
        shape = (num_kv_heads, q.shape[1] // num_kv_heads, k.shape[0], head_dim)
        k, v = (x.transpose(0, 1)[:, None].expand(shape) for x in (k, v))
        rows = q[start : start + length].view(length, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(rows, k, v, scale=scale)
        out[start : start + length] = mixed.permute(2, 0, 1, 3).reshape(length, -1, head_dim)
    return out


def _by_definition(
    q: torch.Tensor,
    k_flat: torch.Tensor,
    v_flat: torch.Tensor,
    batch: AttentionBatch,
    page_size: int,
    scale: float | None,
    mask: AttentionMask,
    softcap: float | None,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """Every mask and option, sequence by sequence, in float32: what the fused paths have no room for."""
    out = torch.empty_like(q)
    num_kv_heads, head_dim = k_flat.shape[1:]
    for i, (start, length, kv_len) in enumerate(zip(batch.query_start, batch.query_lens, batch.kv_lens, strict=True)):
        slots = kv_slots(batch.page_table[i], kv_len, page_size).to(q.device)
        k, v = k_flat.index_select(0, slots).float(), v_flat.index_select(0, slots).float()
        rows = q[start : start + length].float().view(length, num_kv_heads, -1, head_dim)
        scores = torch.einsum("qhgd,khd->hgqk", rows, k) * (1 / math.sqrt(head_dim) if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        keys = torch.arange(kv_len, device=q.device)
        scores.masked_fill_(~mask.visible(keys[kv_len - length :], keys), -math.inf)
        total = scores.logsumexp(-1, keepdim=True)
        weights = torch.exp(scores - total).nan_to_num_(0.0)  # a query that sees nothing
        out[start : start + length] = (
            torch.einsum("hgqk,khd->qhgd", weights, v).reshape(length, -1, head_dim).to(q.dtype)
        )
        if lse is not None:
            lse[start : start + length] = total[..., 0].permute(2, 0, 1).reshape(length, -1)
    return out


def _answer(
    q: torch.Tensor, k_flat: torch.Tensor, v_flat: torch.Tensor, group: _Group, scale: float | None
) -> torch.Tensor:
    if isinstance(group.slots, slice):
        k, v = k_flat[group.slots], v_flat[group.slots]
    else:
        k, v = k_flat.index_select(0, group.slots), v_flat.index_select(0, group.slots)
    if group.query_len > SHORT_WINDOW:
        return long_window(q, k, v, group.pieces, scale)
    return _short_windows(q, k, v, group, scale)


def _short_windows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: _Group, scale: float | None
) -> torch.Tensor:
    """Equal short windows: the query heads of a key head become rows of one attention problem per key head."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    rows = q.view(group.count, group.query_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    rows = rows.transpose(1, 2).reshape(group.count, num_kv_heads, -1, head_dim)
    k = k.view(group.count, group.max_kv, num_kv_heads, head_dim).transpose(1, 2)
    v = v.view(group.count, group.max_kv, num_kv_heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=group.mask, scale=scale)
    out = out.view(group.count, num_kv_heads, group.query_len, -1, head_dim).transpose(1, 2)
    return out.reshape(q.shape)


def _group(query_lens: Sequence[int], kv_lens: Sequence[int], *, with_short: bool) -> list[list[int]]:
    """Indices of sequences to answer together: long windows alone, short ones with their like in both lengths."""
    long = [[i] for i, length in enumerate(query_lens) if length > SHORT_WINDOW]
    if not with_short:
        return long
    short = sorted((i for i, length in enumerate(query_lens) if length <= SHORT_WINDOW), key=lambda i: kv_lens[i])
    groups: list[list[int]] = []
    open_groups: dict[int, list[int]] = {}
    for i in short:
        group = open_groups.get(query_lens[i])
        if group is None or kv_lens[i] > max(PADDING_FLOOR, PADDING_RATIO * kv_lens[group[0]]):
            group = open_groups[query_lens[i]] = []
            groups.append(group)
        group.append(i)
    return [sorted(group) for group in groups] + long


def _query_rows(starts: Sequence[int], query_len: int) -> slice | torch.Tensor:
    if all(start == starts[0] + i * query_len for i, start in enumerate(starts)):
        return slice(starts[0], starts[0] + len(starts) * query_len)
    return (torch.tensor(starts)[:, None] + torch.arange(query_len)).flatten()


def _gather_slots(
    page_table: torch.Tensor, members: Sequence[int], kv_lens: Sequence[int], page_size: int, firsts: Sequence[int]
) -> slice | torch.Tensor:
    """Slots of `kv_lens` positions of all members from `firsts` on, each padded to the longest with its own first slot
    (which is valid)."""
    if len(members) == 1:
        first, end = firsts[0], firsts[0] + kv_lens[0]
        listed: list[int] = page_table[members[0], first // page_size : -(-end // page_size)].tolist()
        if listed == list(range(listed[0], listed[0] + len(listed))):
            start = listed[0] * page_size + first % page_size
            return slice(start, start + kv_lens[0])
        return kv_slots(page_table[members[0]], end, page_size)[first:]
    lens = torch.tensor(kv_lens)[:, None]
    positions = torch.arange(max(kv_lens))[None]
    positions = torch.where(positions < lens, positions, 0) + torch.tensor(firsts)[:, None]
    pages = page_table[list(members)].to(torch.int64).gather(1, positions // page_size)
    return (pages * page_size + positions % page_size).flatten()


def _padded_mask(
    query_len: int, kv_lens: Sequence[int], heads_per_key: int, dtype: torch.dtype, window: int
) -> torch.Tensor | None:
    """[n, 1, query_len * heads_per_key, max_kv] (rows ordered as `_short_windows` has them), or None if all is seen."""
    max_kv = max(kv_lens)
    if query_len == 1 and all(length == max_kv for length in kv_lens):
        return None
    last_seen = (torch.tensor(kv_lens)[:, None] - query_len + torch.arange(query_len))[:, :, None]
    hidden = torch.arange(max_kv) > last_seen
    if window:
        hidden |= torch.arange(max_kv) <= last_seen - window
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
    return mask.repeat_interleave(heads_per_key, dim=1)[:, None]
