"""Engine: inbox, plan, run, apply, emit. One thread calls `step`; any thread may submit, announce, cancel, wake.

A request that fails takes nobody with it: a step that raises is run again window by window, and only those that still
raise fail; handing out what a step brought is guarded request by request. Requests live in the roster, sequences in the
scheduler, tensors in the runner. Knows no transport.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from language_worker.active import ActiveRequest, Sample
from language_worker.api import GenerateRequest
from language_worker.denoiser import Denoiser
from language_worker.drafter import Drafter
from language_worker.errors import Cancelled, EngineError, StepFailed
from language_worker.figures import figures
from language_worker.handover.exports import KVExport
from language_worker.handover.rows import kv_plane
from language_worker.limits import EngineLimits
from language_worker.media import MediaRows
from language_worker.outputs import Output, PromptLogits, StepReport
from language_worker.plan import StepPlan, Window
from language_worker.request import Sequence as TokenSequence
from language_worker.request import Status
from language_worker.roster import Roster
from language_worker.runner import ModelRunner
from language_worker.sampler import Choice
from language_worker.scheduler import Scheduler
from language_worker.step_logits import StepLogits
from language_worker.threads import one_thread
from language_worker.tokenizer import Tokenizer
from language_worker.verification import choose

logger = logging.getLogger(__name__)

SMALL_LOGITS = 1 << 17  # in all rows of a step: a second thread chooses among more


class Engine:
    """See the module. `clock` gives monotonic seconds; `new_seed` gives the seed of a request without one; `drafter`
    goes with a strategy that leaves its drafts open, `denoiser` with one that fills in canvases; `kv_of` says what
    computes the KV, to engines that it is exchanged with."""

    def __init__(
        self,
        *,
        runner: ModelRunner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        dtype: torch.dtype,
        clock: Callable[[], float] = time.monotonic,
        new_seed: Callable[[], int] = lambda: secrets.randbits(64),
        drafter: Drafter | None = None,
        denoiser: Denoiser | None = None,
        kv_of: str = "",
    ) -> None:
        self.runner = runner
        self.drafter = drafter
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.limits = limits
        self.spec = runner.model.spec
        self.dtype = dtype
        self.kv_of = kv_of
        self.kv_plane = kv_plane(runner.cache.row_dtype, runner.cache.row_elements)
        self._clock = clock
        self._roster = Roster(
            model=runner.model,
            tokenizer=tokenizer,
            scheduler=scheduler,
            limits=limits,
            dtype=dtype,
            device=runner.device,
            clock=clock,
            new_seed=new_seed,
            kv_plane=self.kv_plane,
            kv_of=kv_of,
        )
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stats = self._read_stats()

    # -- any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, *, export: KVExport | None = None, imports_kv: bool = False) -> None:
        """Queue a request; whatever is wrong with it comes out as RequestFailed.

        export: where the KV of its prompt goes. imports_kv: that of all but its last position is announced (`announce`)
        and comes into `media_buffer`, instead of media.
        """
        now = self._clock()
        self._post(lambda: self._roster.on_submit(request, now, export=export, imports_kv=imports_kv))

    def export_over(self, export: KVExport, error: EngineError | None = None) -> None:
        """An export is over: its rows are held no longer, and with an error nobody wants the rest of its request."""
        self._post(lambda: self._roster.on_export_over(export, error))

    def announce(self, request_id: str, total_rows: int, items: Sequence[Any]) -> None:
        """The request's media are known: plain maps {"grid": [t, h, w], "rows": n} in prompt order, after a KVHeader's
        where KV comes in their place."""
        self._post(lambda: self._roster.on_announce(request_id, total_rows, items))

    def forget_media(self, request_id: str) -> None:
        """The request's media come anew, from the announcement on: what was computed from the old ones is void."""
        self._post(lambda: self._roster.on_media_restart(request_id))

    def cancel(self, request_id: str) -> None:
        """End a request; it comes out as RequestFailed(Cancelled) unless it is over already."""
        self.fail(request_id, Cancelled(f"request {request_id} was cancelled"))

    def fail(self, request_id: str, error: EngineError) -> None:
        """End a request with `error` unless it is over already."""
        self._post(lambda: self._roster.on_fail(request_id, error))

    def wake(self) -> None:
        """Media rows have arrived: look again whether something can run."""
        self._wake.set()

    def media_buffer(self, request_id: str) -> MediaRows | None:
        """The input buffer of an admitted request (None before, and after its end)."""
        return self._roster.media_buffer(request_id)

    def stats(self) -> dict[str, float]:
        """Gauges and counters as of the last step."""
        return dict(self._stats)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    # -- the engine's thread --------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until something was posted, the next deadline, or the timeout."""
        deadline = self._roster.next_deadline
        if deadline is not None:
            remaining = max(0.0, deadline - self._clock())
            timeout_s = remaining if timeout_s is None else min(timeout_s, remaining)
        self._wake.wait(timeout_s)

    def step(self) -> StepReport:
        """Take the inbox, run one step of the model if anything can run, and report."""
        self._take_inbox()
        self._roster.expire()
        self._roster.grant_media()
        plan = self.scheduler.plan()
        self._move_pages(plan)
        if plan.starts:
            self.runner.start_states(plan.starts)
        if plan.windows:
            self._run(plan)
        self._stats = self._read_stats()
        outputs = self._roster.drain()
        return StepReport(outputs=outputs, did_run=bool(plan.windows or plan.preempted or outputs))

    def _move_pages(self, plan: StepPlan) -> None:
        """Everything that a plan wants in pages before it runs, in this order."""
        movers: list[ModelRunner | Drafter] = [self.runner]
        if self.drafter is not None:
            movers.append(self.drafter)
        counters = self._roster.counters
        counters["num_preemptions_total"] += len(plan.preempted)
        counters["kv_pages_swapped_out_total"] += len(plan.swaps.outs)
        counters["kv_pages_swapped_in_total"] += len(plan.swaps.ins)
        for mover in movers if plan.forks else ():
            mover.copy_pages(plan.forks)
        for mover in movers if plan.swaps.outs or plan.swaps.ins else ():
            mover.swap_pages(plan.swaps)
        if plan.imports:
            self.runner.import_rows(plan.imports)
            counters["kv_tokens_imported_total"] += sum(due.end - due.start for due in plan.imports)
        for mover in movers if plan.copies else ():
            mover.copy_pages(plan.copies)

    def close(self, failure: str | None = None) -> tuple[Output, ...]:
        """Fail everything that is left, and whatever is submitted later; returns the last outputs. failure: why the
        engine cannot go on, where it was not told to stop.
        """
        self._take_inbox()
        self._roster.close(failure)
        self._stats = self._read_stats()
        return self._roster.drain()

    def _take_inbox(self) -> None:
        self._wake.clear()
        while self._inbox:
            self._inbox.popleft()()

    def _run(self, plan: StepPlan) -> None:
        """Run a plan; if it raises, run its windows one by one, so that only those at fault fail."""
        try:
            filled, step, choices = self._compute(plan)
        except Exception as error:
            if len(plan.windows) == 1:
                self._fail_window(plan, error)
                return
            logger.warning("a step of %d sequences failed (%s); running them one by one", len(plan.windows), error)
            for window in plan.windows:
                if window.seq.status is Status.RUNNING:
                    self._rerun(StepPlan(windows=(window,)))
            return
        self._apply(filled, step, choices)

    def _rerun(self, plan: StepPlan) -> None:
        """One window of a step that failed, from the recurrent state that it began with."""
        (window,) = plan.windows
        try:
            if self.spec.state is not None:
                self.runner.restore_state(window.seq, window.start, self.scheduler.max_step_tokens)
        except Exception as error:
            self._fail_window(plan, error)
        else:
            self._run(plan)

    def _compute(self, plan: StepPlan) -> tuple[StepPlan, StepLogits, list[list[list[Choice]]]]:
        """Everything that can fail; changes nothing but recurrent state. Returns the plan with all drafts made, and the
        choices of each sampling window, for each sample it serves."""
        with torch.inference_mode():
            if self.drafter is not None:
                plan = self.drafter.fill(plan, lambda seq: self._roster.sample_of(seq.key).state)
            if self.denoiser is not None:
                return self.denoiser.run(plan, lambda seq: self._roster.sample_of(seq.key).state)
            step = self.runner.run(plan)
            served = [self._roster.active_of(w.seq.key).states_served_by(w.seq.key[1]) for w in step.sampling]
            with one_thread(step.logits.numel() <= SMALL_LOGITS):
                return plan, step, choose(step, served, num_token_ids=self.tokenizer.vocab_size) if served else []

    def _fail_window(self, plan: StepPlan, error: Exception) -> None:
        active = self._roster.active_of(plan.windows[0].seq.key)
        logger.error("request %s failed in its step", active.request.request_id, exc_info=error)
        if not isinstance(error, StepFailed):
            error = StepFailed(f"the model step failed: {type(error).__name__}: {error}")
        self._roster.on_fail(active.request.request_id, error)

    def _apply(self, plan: StepPlan, step: StepLogits, choices: Iterable[list[list[Choice]]]) -> None:
        """Hand out what a step brought; whatever goes wrong in that for one request ends this request alone."""
        for part in step.prompt_slices:
            rows = step.logits[part.first_row :][: part.length]
            self._guarded(part.window, partial(self._collect, part.window.seq.key, part.window.start, rows))
        chosen = {id(window): served for window, served in zip(step.sampling, choices, strict=True)}
        now = self._clock()
        self._roster.counters["computed_tokens_total"] += plan.num_tokens
        for window in plan.windows:
            self._guarded(window, partial(self._conclude, window, chosen.get(id(window)), now))

    def _guarded(self, window: Window, action: Callable[[], None]) -> None:
        """Run `action` for the window's request, unless that has failed with another of its windows."""
        if window.seq.status is Status.RUNNING:
            self._roster.guarded(self._roster.active_of(window.seq.key), action)

    def _conclude(self, window: Window, served: list[list[Choice]] | None, now: float) -> None:
        """A window's step ran; served: the choices of the samples that its logits serve."""
        if window.fills:
            self._preview(window)
        self.scheduler.commit(window, () if served is None else [choice.token_id for choice in served[0]])
        if window.drafts and served is not None:
            self._count_drafts(len(window.drafts), len(served[0]) - 1)
        self._export(window.seq)
        if served is not None and window.seq.status is Status.RUNNING:  # else its export failed
            self._serve(window.seq.key, served, now)

    def _export(self, seq: TokenSequence) -> None:
        """Send what became final of a prompt whose KV is for another engine; of a canvas, all at once."""
        active = self._roster.active_of(seq.key)
        export = active.export
        if export is not None and seq.canvas is not None:
            if seq.canvas.can_hand_over:
                self._roster.guarded(active, lambda: self._hand_over(active, seq, export))
        elif export is not None:
            self._roster.guarded(
                active,
                lambda: export.advance(
                    seq.kv_len,
                    lambda start, end: self.runner.export_rows(seq, start, end),
                    lambda: {} if self.spec.state is None else self.runner.export_state(seq),
                ),
            )

    def _hand_over(self, active: ActiveRequest, seq: TokenSequence, export: KVExport) -> None:
        """A canvas was computed as it is at its beginning: that is all that is wanted here."""
        assert seq.canvas is not None
        export.advance(seq.canvas.prompt_kv.num_rows, lambda start, end: self.runner.export_rows(seq, start, end))
        self._roster.hand_over(active)

    def _preview(self, window: Window) -> None:
        """Show the block that a canvas' step leaves, if its request asked for that."""
        canvas, active = window.seq.canvas, self._roster.active_of(window.seq.key)
        if canvas is not None and canvas.params.show_steps and active.ranking is None:
            item = active.samples[window.seq.key[1]]
            self._roster.outputs.append(item.show(active.request.request_id, canvas.preview(window.fills)))

    def _collect(self, key: tuple[int, int], start: int, logits: torch.Tensor) -> None:
        active = self._roster.active_of(key)
        collector = active.collector
        if collector is not None and collector.add(start, logits) and collector.logits is not None:
            self._roster.outputs.append(PromptLogits(request_id=active.request.request_id, logits=collector.logits))

    def _serve(self, key: tuple[int, int], choices: list[list[Choice]], now: float) -> None:
        """Give a window's choices to its sample, and at the end of the prompt to the others, which begin with them."""
        active = self._roster.active_of(key)
        if active.first_token_at is None:
            active.first_token_at = now
        item = active.samples[key[1]]
        self._emit(active, item, choices[0])
        for other, first in zip(active.samples[1:], choices[1:], strict=False):
            other.seq.tokens.append(first[0].token_id)
            self._emit(active, other, first)
            if not other.is_done:
                self.scheduler.fork(other.seq)  # while the first still holds the prompt's pages
        if item.is_done:
            self.scheduler.end(item.seq)
        if active.is_done:
            self._roster.finish(active, now)

    def _emit(self, active: ActiveRequest, item: Sample, choices: list[Choice]) -> None:
        chunk = item.accept(active.request.request_id, choices, active.take_prompt_logprobs(item.state.index))
        self._roster.emit(active, chunk)
        active.num_generated += len(chunk.token_ids)
        self._roster.counters["generation_tokens_total"] += len(chunk.token_ids)

    def _count_drafts(self, num_proposed: int, num_accepted: int) -> None:
        self._roster.counters["spec_decode_num_draft_tokens_total"] += num_proposed
        self._roster.counters["spec_decode_num_accepted_tokens_total"] += num_accepted

    def _read_stats(self) -> dict[str, float]:
        return figures(self.scheduler, self._roster, self.kv_plane.row_bytes)
