"""Handovers: the requests of one engine whose KV goes to another engine or comes from one, and the room for it.

One budget of rows in host memory, given oldest first and whole. An import holds its share until its request ends, since
a preempted sequence starts from it again; an export until the peer has every row. Neither announces nor admits anything
before it has its share, so two engines that wait for each other's room cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from language_worker import intake
from language_worker.active import ActiveRequest
from language_worker.canvas import PromptKV
from language_worker.diffusion_params import DiffusionParams
from language_worker.errors import KVMismatch, MediaTooLarge, PromptTooLong
from language_worker.handover.exports import KVExport
from language_worker.handover.rows import DTYPES, LAST_INPUT, MEDIA, ImportedRows, KVHeader, unpack_state
from language_worker.media import InputBudget, MediaItem, MediaRows
from language_worker.models.base import LanguageModel, ModelSpec, StateSpec
from transfer.tensors import PlaneSpec


class Handovers:
    """`capacity` in rows of `plane`. kv_of: what computes this engine's own KV; that of anything else is refused.
    spec: what a sequence keeps beside its pages, `dtype` the model's."""

    def __init__(
        self,
        capacity: int,
        plane: PlaneSpec,
        kv_of: str = "",
        *,
        spec: StateSpec | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._plane = plane
        self._kv_of = kv_of
        self._spec = spec
        self._dtype = dtype
        self._budget = InputBudget(capacity)
        self._wanted: dict[int, tuple[ActiveRequest, int]] = {}  # waits for its share
        self._arriving: dict[int, ActiveRequest] = {}
        self._passing: dict[int, ActiveRequest] = {}  # exports of which nothing is computed, until their media are here
        self._leaving: dict[KVExport, int] = {}  # of those that were announced, the order of the request

    @property
    def num_rows_reserved(self) -> int:
        return self._budget.num_reserved

    def request(self, active: ActiveRequest, num_rows: int) -> None:
        """Ask for room; PromptTooLong when there can never be enough."""
        try:
            self._budget.request(active.order, num_rows, active.came_at)
        except MediaTooLarge:
            raise PromptTooLong(
                f"the prompt's KV takes {num_rows} rows and the buffer between prefill and decode holds "
                f"{self._budget.capacity}; shorten the prompt, or raise language.kv_buffer_tokens"
            ) from None
        self._wanted[active.order] = active, num_rows

    def grant(self) -> list[ActiveRequest]:
        """Requests that now have room, oldest first."""
        return [self._wanted[order][0] for order in self._budget.grant()]

    def forget(self, active: ActiveRequest) -> None:
        """The request is over; an export that was announced holds its room until its rows have left."""
        self._wanted.pop(active.order, None)
        self._arriving.pop(active.order, None)
        self._passing.pop(active.order, None)
        if active.export not in self._leaving:
            self._budget.release(active.order)

    # -- imports --------------------------------------------------------------------------------------------------

    def announced(
        self, active: ActiveRequest, total_rows: int, bodies: Sequence[Any], model: LanguageModel, max_model_len: int
    ) -> None:
        """The prompt is known, and which KV of it comes. Raises what is wrong with either."""
        active.header = header = KVHeader.from_body(bodies[0] if bodies else None)
        active.items = tuple(MediaItem.from_body(body, i) for i, body in enumerate(bodies[1:]))
        num_rows = active.num_media_rows
        intake.check_items(active.items, active.request.num_media, num_rows, model)
        length = len(active.request.prompt_token_ids) + num_rows - len(active.items)
        intake.check_prompt_length(length, max_model_len)
        wanted = PromptKV(num_rows=length - 1)
        if model.spec.mask_token_id is not None:
            sampling = active.request.sampling
            num_masks = intake.answer_length(sampling, length, max_model_len)
            wanted = PromptKV.of(sampling.diffusion or DiffusionParams(), length, num_masks)
        if header.num_tokens != wanted.num_rows or header.num_tokens > total_rows:
            raise KVMismatch(f"{total_rows} rows, KV of {header.num_tokens}, come for a prompt of {length} tokens")
        if header.num_masks != wanted.num_masks:
            raise KVMismatch(
                f"the prefill worker computed the prompt before {header.num_masks} masks, and this worker's canvas has "
                f"{wanted.num_masks}: give both the same max_model_len"
            )
        if header.kv_of != self._kv_of:
            raise KVMismatch(
                f"the prefill worker's KV is that of {header.kv_of!r} and this worker's of {self._kv_of!r}: give both "
                "the same model folder, config_overrides, lora, quantization, dtype and kv_cache_dtype, and the same "
                "max_model_len where the model's rotary scaling is 'dynamic'"
            )
        self.request(active, total_rows)

    def expect(self, active: ActiveRequest) -> int:
        """Make the buffer for rows that may come now; returns how many."""
        _, num_rows = self._wanted.pop(active.order)
        (row_elements,), dtype = self._plane.row_shape, DTYPES[self._plane.dtype]
        active.arriving = MediaRows(num_rows, row_elements, dtype=dtype, device=torch.device("cpu"))
        self._arriving[active.order] = active
        return num_rows

    def take_complete(self) -> list[ActiveRequest]:
        """Requests whose rows have all come since the last call, oldest first."""
        complete = [a for _, a in sorted(self._arriving.items()) if a.arriving is not None and a.arriving.is_full]
        for active in complete:
            del self._arriving[active.order]
        return complete

    def unpack(self, active: ActiveRequest, spec: ModelSpec, *, device: torch.device) -> None:
        """All rows are here: what they are to the model."""
        header, arriving = active.header, active.arriving
        assert header is not None and arriving is not None
        needed = sum(plane.row_bytes for plane in header.state)
        if needed > arriving.rows[0, header.num_tokens :].nbytes:
            raise KVMismatch(f"the KV came without all of its {needed} bytes of state")
        state = unpack_state(header, arriving.rows[0, header.num_tokens :])
        last_input = state.pop(LAST_INPUT, None)
        if last_input is not None:
            active.media = _only_last(active.items or (), last_input, device)
        if spec.mask_token_id is not None and active.items:
            active.media = self._all_media(active.items, state.pop(MEDIA, None), spec, device)
        wanted = {} if self._spec is None else self._spec.empty(self._dtype, "meta")
        if _described(state) != _described(wanted):
            raise KVMismatch(f"the KV came with the state {_described(state)}; this model keeps {_described(wanted)}")
        active.imported = ImportedRows(rows=arriving.rows[0, : header.num_tokens], state=state)

    def _all_media(
        self, items: Sequence[MediaItem], rows: torch.Tensor | None, spec: ModelSpec, device: torch.device
    ) -> MediaRows:
        shape = len(spec.media_planes), sum(item.rows for item in items), spec.hidden_size
        if rows is None or rows.shape != shape or rows.dtype != self._dtype:
            found = "none" if rows is None else f"{tuple(rows.shape)} in {rows.dtype}"
            raise KVMismatch(f"a canvas needs its media, {shape} in {self._dtype}; with its KV came {found}")
        return _filled(rows, device)

    # -- exports --------------------------------------------------------------------------------------------------

    def request_export(self, active: ActiveRequest) -> None:
        """Ask for room for the KV of a prompt that is known."""
        assert active.export is not None
        self.request(active, active.export.num_rows(_leaving(active).num_rows, self._leaving_state(active, "meta")))

    def begin(self, active: ActiveRequest) -> None:
        """There is room: say what will come."""
        assert active.export is not None
        del self._wanted[active.order]
        self._leaving[active.export] = active.order
        media, leaving = [item.to_body() for item in active.items or ()], _leaving(active)
        active.export.announce(leaving.num_rows, self._leaving_state(active), media, leaving.num_masks)
        if active.has_nothing_to_compute:
            self._passing[active.order] = active

    def take_passed_on(self) -> list[ActiveRequest]:
        """Exports of which nothing is computed, and everything has come since the last call, oldest first."""
        complete = [a for _, a in sorted(self._passing.items()) if a.media is None or a.media.is_full]
        for active in complete:
            del self._passing[active.order]
        return complete

    def export_over(self, export: KVExport) -> None:
        """Its rows are held no longer."""
        order = self._leaving.pop(export, None)
        if order is not None:
            self._budget.release(order)

    def _leaving_state(self, active: ActiveRequest, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Recurrent state, to be filled, and what else the decode engine needs."""
        state = {} if self._spec is None else self._spec.empty(self._dtype, device)
        return {**state, **_state_of(active)}


def _leaving(active: ActiveRequest) -> PromptKV:
    canvas = active.samples[0].seq.canvas
    return PromptKV(num_rows=len(active.prompt) - 1) if canvas is None else canvas.prompt_kv


def _state_of(active: ActiveRequest) -> dict[str, torch.Tensor]:
    """What the decode engine needs beside the KV: the last input, where that is no token; for a canvas, all media."""
    if active.samples[0].seq.canvas is not None:
        return {} if active.media is None else {MEDIA: active.media.rows}
    if active.media is None or not active.media_positions or active.media_positions[-1] != len(active.prompt) - 1:
        return {}
    return {LAST_INPUT: active.media.rows[:, -1]}


def _described(state: Mapping[str, torch.Tensor]) -> str:
    parts = (f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(state.items()))
    return ", ".join(parts) or "(none)"


def _only_last(items: Sequence[MediaItem], row: torch.Tensor, device: torch.device) -> MediaRows:
    """Media rows of which none but the last [planes, hidden] is ever needed."""
    rows = row.new_empty(row.shape[0], sum(item.rows for item in items), row.shape[1])
    rows[:, -1] = row
    return _filled(rows, device)


def _filled(rows: torch.Tensor, device: torch.device) -> MediaRows:
    """Media rows [planes, total, hidden] that are all here."""
    num_planes, total, hidden_size = rows.shape
    media = MediaRows(total, hidden_size, dtype=rows.dtype, device=device, num_planes=num_planes)
    media.write(0, *rows)
    return media
