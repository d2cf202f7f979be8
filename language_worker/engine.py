"""Engine: inbox, plan, run, apply, emit. One thread calls `step`; any thread may submit, announce, cancel, wake.

A request that fails takes nobody with it: a step that raises is run again window by window, and only those that still
raise fail. Requests live in the roster, sequences in the scheduler, tensors in the runner. Knows no transport.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from language_worker.api import GenerateRequest
from language_worker.errors import Cancelled, EngineError, StepFailed
from language_worker.media import MediaRows
from language_worker.outputs import Output, PromptLogits, StepReport
from language_worker.plan import StepPlan
from language_worker.request import Status
from language_worker.roster import EngineLimits, Roster
from language_worker.runner import ModelRunner, StepLogits
from language_worker.sampler import Choice, sample
from language_worker.scheduler import Scheduler
from language_worker.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """See the module. `clock` gives monotonic seconds; `new_seed` gives the seed of a request without one."""

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
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.limits = limits
        self.spec = runner.model.spec
        self.dtype = dtype
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
        )
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stats = self._read_stats()

    # -- any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request; whatever is wrong with it comes out as RequestFailed."""
        now = self._clock()
        self._post(lambda: self._roster.on_submit(request, now))

    def announce(self, request_id: str, total_rows: int, items: Sequence[Any]) -> None:
        """The request's media are known: plain maps {"grid": [t, h, w], "rows": n} in prompt order."""
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
        self._roster.counters["num_preemptions_total"] += len(plan.preempted)
        if plan.windows:
            self._run(plan)
        self._stats = self._read_stats()
        return StepReport(outputs=self._roster.drain(), did_run=bool(plan.windows or plan.preempted))

    def close(self) -> tuple[Output, ...]:
        """Fail everything that is left, and whatever is submitted later; returns the last outputs."""
        self._take_inbox()
        self._roster.close()
        self._stats = self._read_stats()
        return self._roster.drain()

    def _take_inbox(self) -> None:
        self._wake.clear()
        while self._inbox:
            self._inbox.popleft()()

    def _run(self, plan: StepPlan) -> None:
        """Run a plan; if it raises, run its windows one by one, so that only those at fault fail."""
        try:
            step, choices = self._compute(plan)
        except Exception as error:
            if len(plan.windows) == 1:
                self._fail_window(plan, error)
                return
            logger.warning("a step of %d sequences failed (%s); running them one by one", len(plan.windows), error)
            for window in plan.windows:
                if window.seq.status is Status.RUNNING:
                    self._run(StepPlan(windows=(window,)))
            return
        self._apply(plan, step, choices)

    def _compute(self, plan: StepPlan) -> tuple[StepLogits, list[Choice]]:
        """Everything that can fail; changes no state."""
        with torch.inference_mode():
            step = self.runner.run(plan)
            states = [self._roster.sample_of(window.seq.key).state for window in step.sampling]
            num_ids = self.tokenizer.vocab_size
            return step, sample(step.sampled(), states, num_token_ids=num_ids) if states else []

    def _fail_window(self, plan: StepPlan, error: Exception) -> None:
        active = self._roster.active_of(plan.windows[0].seq.key)
        logger.error("request %s failed in its step", active.request.request_id, exc_info=error)
        message = f"the model step failed: {type(error).__name__}: {error}"
        self._roster.on_fail(active.request.request_id, StepFailed(message))

    def _apply(self, plan: StepPlan, step: StepLogits, choices: Iterable[Choice]) -> None:
        for part in step.prompt_slices:
            self._collect(part.window.seq.key, part.window.start, step.logits[part.first_row :][: part.length])
        chosen = {id(window): choice for window, choice in zip(step.sampling, choices, strict=True)}
        now = self._clock()
        self._roster.counters["computed_tokens_total"] += sum(window.length for window in plan.windows)
        for window in plan.windows:
            choice = chosen.get(id(window))
            self.scheduler.commit(window, () if choice is None else (choice.token_id,))
            if choice is not None:
                self._emit(window.seq.key, choice, now)

    def _collect(self, key: tuple[int, int], start: int, logits: torch.Tensor) -> None:
        active = self._roster.active_of(key)
        collector = active.collector
        if collector is not None and collector.add(start, logits) and collector.logits is not None:
            self._roster.outputs.append(PromptLogits(request_id=active.request.request_id, logits=collector.logits))

    def _emit(self, key: tuple[int, int], choice: Choice, now: float) -> None:
        active = self._roster.active_of(key)
        item = active.samples[key[1]]
        chunk = item.accept(active.request.request_id, choice, active.take_prompt_logprobs(key[1]))
        self._roster.outputs.append(chunk)
        active.num_generated += 1
        self._roster.counters["generation_tokens_total"] += 1
        if active.first_token_at is None:
            active.first_token_at = now
        if not item.is_done:
            return
        self.scheduler.end(item.seq)
        if active.is_done:
            self._roster.finish(active, now)

    def _read_stats(self) -> dict[str, float]:
        pool, roster = self.scheduler.pool, self._roster
        names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total", "request_failure_total")
        return {
            "num_requests_running": roster.num_running,
            "num_requests_waiting": roster.num_waiting,
            "kv_cache_usage_perc": pool.num_in_use / pool.num_pages,
            "kv_pages_referenced": pool.num_in_use,
            "kv_pages_cached": 0,
            "input_buffer_rows_reserved": roster.num_rows_reserved,
            **{name: roster.counters[name] for name in (*names, "num_preemptions_total", "computed_tokens_total")},
        }
