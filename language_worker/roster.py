"""Roster: every request inside the engine, from submission to its one RequestDone or RequestFailed.

Owns intake, deadlines, the input-buffer budget and the outputs that wait to be handed out. Runs on the engine's thread
only; knows no tensors but the media buffers it allocates, and nothing of steps.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from language_worker import intake
from language_worker.active import ActiveRequest, Sample
from language_worker.api import GenerateRequest, RequestFailed, TokenChunk
from language_worker.errors import (
    DeadlineExceeded,
    EngineError,
    EngineFailed,
    EngineStopped,
    InvalidRequest,
    MediaFailed,
    MediaMismatch,
    QueueFull,
    StepFailed,
)
from language_worker.handover.exports import KVExport
from language_worker.handover.ledger import Handovers
from language_worker.limits import EngineLimits
from language_worker.media import InputBudget, MediaItem, MediaRows
from language_worker.models.base import LanguageModel
from language_worker.outputs import MediaAdmitted, Output
from language_worker.scheduler import Scheduler
from language_worker.tokenizer import Tokenizer
from language_worker.tools.machine import find_toolbox
from transfer.tensors import PlaneSpec

logger = logging.getLogger(__name__)


class Roster:
    """See the module. `clock` gives monotonic seconds; `new_seed` gives the seed of a request without one."""

    def __init__(
        self,
        *,
        model: LanguageModel,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        limits: EngineLimits,
        dtype: torch.dtype,
        device: torch.device,
        clock: Callable[[], float],
        new_seed: Callable[[], int],
        kv_plane: PlaneSpec,
        kv_of: str,
    ) -> None:
        self._model = model
        self._spec = model.spec
        self._tokenizer = tokenizer
        self._toolbox = find_toolbox(model.spec.tool_machine, tokenizer)
        self._scheduler = scheduler
        self._limits = limits
        self._dtype = dtype
        self._device = device
        self._clock = clock
        self._new_seed = new_seed
        self._budget = InputBudget(limits.input_buffer_tokens)
        self.handovers = Handovers(limits.kv_buffer_tokens, kv_plane, kv_of, spec=model.spec.state, dtype=dtype)
        self._requests: dict[str, ActiveRequest] = {}
        self._by_order: dict[int, ActiveRequest] = {}
        self._next_order = 0
        self.outputs: list[Output] = []
        self.counters: Counter[str] = Counter()
        self.is_closed = False

    @property
    def num_waiting(self) -> int:
        """Requests none of whose samples is running."""
        return len(self._requests) - self.num_running

    @property
    def num_running(self) -> int:
        return len({seq.key[0] for seq in self._scheduler.running})

    @property
    def num_rows_reserved(self) -> int:
        return self._budget.num_reserved

    @property
    def next_deadline(self) -> float | None:
        return min((a.deadline for a in self._requests.values() if a.deadline is not None), default=None)

    def active_of(self, key: tuple[int, int]) -> ActiveRequest:
        """The request that a sequence key belongs to."""
        return self._by_order[key[0]]

    def sample_of(self, key: tuple[int, int]) -> Sample:
        return self._by_order[key[0]].samples[key[1]]

    def media_buffer(self, request_id: str) -> MediaRows | None:
        """The input buffer of an admitted request (None before, and after its end)."""
        active = self._requests.get(request_id)
        if active is None:
            return None
        return active.arriving if active.imports_kv else active.media

    def drain(self) -> tuple[Output, ...]:
        """The outputs since the last drain."""
        outputs, self.outputs = tuple(self.outputs), []
        return outputs

    def close(self, failure: str | None = None) -> None:
        """Fail everything that is left and refuse whatever comes later. failure: what broke the engine, if it broke."""
        self.is_closed = True
        for request_id in list(self._requests):
            closed = EngineStopped(f"the engine closed while request {request_id} was running")
            self.on_fail(request_id, closed if failure is None else EngineFailed(f"request {request_id}: {failure}"))

    def on_submit(
        self, request: GenerateRequest, now: float, *, export: KVExport | None = None, imports_kv: bool = False
    ) -> None:
        """Take a request in, or fail it; one without media is queued at once."""
        try:
            if self.is_closed:
                raise EngineStopped("the engine is closed")
            if request.request_id in self._requests:
                raise InvalidRequest(f"request_id {request.request_id!r} is already running")
            if self.num_waiting >= self._limits.max_waiting:
                raise QueueFull(f"{self.num_waiting} requests wait already (max_waiting); try again later")
            intake.check_request(
                request,
                self._spec,
                self._limits.max_model_len,
                eos_ids=self._tokenizer.eos_token_ids,
                num_token_ids=self._tokenizer.vocab_size,
                never_ids=self._tokenizer.special_ids(self._spec.unspoken),
            )
            seed = request.sampling.seed
            active = ActiveRequest(
                request=request,
                order=self._next_order,
                seed=self._new_seed() if seed is None else seed,
                submitted_at=now,
                deadline=None if request.deadline_ms is None else now + request.deadline_ms / 1000,
                export=export,
                imports_kv=imports_kv,
            )
        except Exception as error:
            self._refuse(request.request_id, _typed(request.request_id, error))
            return
        self._next_order += 1
        self._requests[request.request_id] = active
        self._by_order[active.order] = active
        if request.num_media == 0 and not imports_kv:
            self.guarded(active, lambda: self._schedule(active))

    def _refuse(self, request_id: str, error: EngineError) -> None:
        """Report the failure of a request of which nothing is kept."""
        self.outputs.append(RequestFailed(request_id=request_id, error=error))
        self.counters["request_failure_total"] += 1

    def on_announce(self, request_id: str, total_rows: int, items: Sequence[Any]) -> None:
        """The sizes of a request's media are known; later announcements change nothing but after a restart."""
        active = self._requests.get(request_id)
        if active is not None and (active.items is None or active.awaits_announcement):
            self.guarded(active, lambda: self._expand(active, total_rows, items))

    def _expand(self, active: ActiveRequest, total_rows: int, bodies: Sequence[Any]) -> None:
        request = active.request
        if active.imports_kv:
            self.handovers.announced(active, total_rows, bodies, self._model, self._limits.max_model_len)
            return
        items = tuple(MediaItem.from_body(body, i) for i, body in enumerate(bodies))
        intake.check_items(items, request.num_media, total_rows, self._model)
        if active.items is not None:
            self._readmit(active, items)
            return
        intake.check_prompt_length(len(request.prompt_token_ids) + total_rows - len(items), self._limits.max_model_len)
        self._budget.request(active.order, total_rows, active.came_at)
        active.items = items

    def on_media_restart(self, request_id: str) -> None:
        """Its media come anew: the request is as it was before they were announced, and keeps its age. What it has
        said already, because a cache had its prompt, it does not say again: then the rows are only for recomputing."""
        active = self._requests.get(request_id)
        if active is None:
            return
        if active.export is not None and active.export.is_announced:
            text = f"the media of request {request_id} came anew after KV made from the old ones had begun to leave"
            self.on_fail(request_id, MediaFailed(f"{text}; send the request again"))
            return
        if active.num_generated:
            active.refill_media()
            return
        for item in active.samples:
            self._scheduler.end(item.seq)
        self._budget.release(active.order)
        self.handovers.forget(active)
        active.forget_media()

    def _readmit(self, active: ActiveRequest, items: tuple[MediaItem, ...]) -> None:
        """Media that came anew after the answer had begun go where the old ones were. Under another key they may differ
        as far as the dtype tolerates: good enough to go on with, but not for others under the name of the old ones."""
        if [item.grid for item in items] != [item.grid for item in active.items or ()]:
            raise MediaMismatch(
                f"the media of request {active.request.request_id} were sent anew in other sizes after its answer had "
                "begun; send the request again"
            )
        active.replace_media(items)
        self._report_admitted(active)

    def on_export_over(self, export: KVExport, error: EngineError | None) -> None:
        """An export has ended, with `error` before the peer had every row; an id may be another request's by now."""
        active = self._requests.get(export.request_id)
        if error is not None and active is not None and active.export is export:
            self.on_fail(export.request_id, error)
        self.handovers.export_over(export)

    def grant_media(self) -> None:
        """Reserve input buffers, oldest first, and queue the requests that got theirs, or whose KV has all come."""
        turns: list[tuple[Callable[[], list[ActiveRequest]], Callable[[ActiveRequest], None]]] = [
            (lambda: [self._by_order[order] for order in self._budget.grant()], self._admit_media),
            (self.handovers.grant, self._admit_kv),
            (self.handovers.take_complete, self._schedule),
            (self.handovers.take_passed_on, self.hand_over),
        ]
        for ready, act in turns:
            for active in ready():
                self.guarded(active, partial(act, active))

    def _admit_kv(self, active: ActiveRequest) -> None:
        """There is room for the request's KV: its rows may come, or its prompt may be computed for another engine."""
        if active.imports_kv:
            total_rows = self.handovers.expect(active)
            self.outputs.append(MediaAdmitted(request_id=active.request.request_id, num_rows=total_rows))
        else:
            self.handovers.begin(active)
            if not active.has_nothing_to_compute:
                self._scheduler.add(active.samples[0].seq)

    def hand_over(self, active: ActiveRequest) -> None:
        """Of a canvas for another engine all KV has left: what goes behind it does, and that is all."""
        assert active.export is not None
        active.export.finish()
        self.finish(active, self._clock())

    def _admit_media(self, active: ActiveRequest) -> None:
        """The request's rows are reserved: allocate them (which may fail for want of memory) and queue the request."""
        num_planes, size = len(self._spec.media_planes), self._spec.hidden_size
        active.media = MediaRows(
            active.num_media_rows, size, dtype=self._dtype, device=self._device, num_planes=num_planes
        )
        self._report_admitted(active)
        self._schedule(active)

    def _report_admitted(self, active: ActiveRequest) -> None:
        request_id, rows, restarts = active.request.request_id, active.num_media_rows, active.num_restarts
        self.outputs.append(MediaAdmitted(request_id=request_id, num_rows=rows, num_restarts=restarts))

    def _schedule(self, active: ActiveRequest) -> None:
        """The prompt is known and its rows are reserved: build the samples and queue them."""
        items = active.items or ()
        if active.header is not None:
            self.handovers.unpack(active, self._spec, device=self._device)
        active.expand(self._spec.media_token_id)
        if active.request.return_logits:
            intake.check_logits_size(len(active.prompt), self._spec.vocab_size, self._limits.max_logits_bytes)
        grids = [(start, item.grid) for start, item in zip(active.starts, items, strict=True)]
        positions = self._model.prompt_positions(len(active.prompt), grids)
        begun = active.build_samples(
            self._tokenizer,
            positions,
            max_model_len=self._limits.max_model_len,
            spec=self._spec,
            toolbox=self._toolbox,
        )
        if active.export is not None:
            if self._spec.state is not None:
                begun[0].pause_at = len(active.prompt) - 1  # what the decode engine goes on from
            self.handovers.request_export(active)
        else:
            for seq in begun:
                self._scheduler.add(seq)
        if not active.is_counted:
            self.counters["prompt_tokens_total"] += len(active.prompt)
            active.is_counted = True

    def emit(self, active: ActiveRequest, chunk: TokenChunk) -> None:
        """Hand out a chunk; of a request that keeps only its best samples, once all have ended."""
        if active.ranking is None:
            self.outputs.append(chunk)
        else:
            active.ranking.add(chunk)

    def guarded(self, active: ActiveRequest, action: Callable[[], None]) -> None:
        """Run `action`; a typed error ends the request, and so does any other, logged."""
        request_id = active.request.request_id
        try:
            action()
        except Exception as error:
            self.on_fail(request_id, _typed(request_id, error))

    def expire(self) -> None:
        """Fail every request whose deadline has passed."""
        now = self._clock()
        late = [a for a in self._requests.values() if a.deadline is not None and a.deadline <= now]
        for active in late:
            name, waited = active.request.request_id, round((now - active.submitted_at) * 1000)
            self.on_fail(name, DeadlineExceeded(f"request {name} was not finished after {waited} ms"))

    def on_fail(self, request_id: str, error: EngineError) -> None:
        """End a request with `error`; one that is over already stays as it was."""
        active = self._requests.get(request_id)
        if active is None:
            return
        self._forget(active)
        self._refuse(request_id, error)

    def _forget(self, active: ActiveRequest) -> None:
        """Give back everything the request holds."""
        for item in active.samples:
            self._scheduler.end(item.seq)
        self._budget.release(active.order)
        self.handovers.forget(active)
        del self._requests[active.request.request_id]
        del self._by_order[active.order]

    def finish(self, active: ActiveRequest, now: float) -> None:
        """Every sample has ended: report and forget the request."""
        best = () if active.ranking is None else active.ranking.best(active.request.sampling)
        last: tuple[Output, ...] = (*best, active.report(now))  # all that may fail, while it can still fail the request
        self._forget(active)
        self.counters["request_success_total"] += 1
        self.outputs += last


def _typed(request_id: str, error: Exception) -> EngineError:
    """`error` itself if it is one of ours; anything else is a fault of this side, logged."""
    if isinstance(error, EngineError):
        return error
    logger.error("request %s failed", request_id, exc_info=error)
    return StepFailed(f"internal error: {type(error).__name__}: {error}")
