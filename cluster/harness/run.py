"""Runs a scenario step by step and says what held and what did not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.errors import ClusterError
from cluster.harness.load import Sample, percentile, run_load
from cluster.harness.oracle import Judge
from cluster.harness.plan import Fault, Scenario, Step
from cluster.harness.target import Target
from embedding_worker.errors import EmbedError
from language_worker.errors import EngineError
from transfer.errors import TransferError

MAX_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """samples: of every request. broken_rules: what did not hold, in words. fault: what was done, and when (seconds
    since the scenario began); "" where nothing was planned.
    """

    name: str
    samples: list[Sample]
    broken_rules: list[str]
    started_s: float
    duration_s: float
    fault: str = ""
    fault_s: float = 0.0

    @property
    def num_failed(self) -> int:
        return sum(bool(sample.failure) for sample in self.samples)

    @property
    def tokens_per_s(self) -> float:
        return sum(sample.num_tokens for sample in self.samples) / max(self.duration_s, 1e-9)

    def ttft_ms(self, share: float) -> float:
        """Of the streamed answers."""
        return 1e3 * percentile([s.ttft_s for s in self.samples if s.ttft_s], share)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioResult:
    """error: why it could not be run to its end; its remaining steps are missing then."""

    name: str
    steps: list[StepResult]
    duration_s: float
    error: str = ""

    @property
    def has_passed(self) -> bool:
        return not self.error and not any(step.broken_rules for step in self.steps)


@dataclass
class _Trigger:
    """Deals the fault when enough requests were answered, once, on a thread of its own."""

    target: Target
    fault: Fault | None
    began_s: float
    done: str = ""
    at_s: float = 0.0
    error: Exception | None = None
    _thread: threading.Thread | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def on_answers(self, count: int) -> None:
        with self._lock:
            if self.fault is None or self._thread is not None or count < self.fault.after_answers:
                return
            self._thread = threading.Thread(target=self._deal, args=(self.fault,), name="harness-fault", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _deal(self, fault: Fault) -> None:
        self.at_s = time.monotonic() - self.began_s
        try:
            self.done = self.target.deal(fault)
        except Exception as error:
            self.error = error


def run_scenario(scenario: Scenario, *, api_key: str = "", on_status: Callable[[str], None]) -> ScenarioResult:
    """What cannot be started, asked or dealt is the result's error; nothing is left running."""
    began_s, steps, error = time.monotonic(), list[StepResult](), ""
    is_upgraded = any(step.fault is not None and step.fault.kind == "upgrade" for step in scenario.steps)
    try:
        with Target(scenario.topology, is_upgraded=is_upgraded, api_key=api_key, on_status=on_status) as target:
            judge = Judge(scenario.oracle, target.config)
            for step in scenario.steps:
                on_status(f"{scenario.name}: {step.name}")
                steps.append(_run_step(target, judge, step, began_s))
    except (ClusterError, EmbedError, EngineError, TransferError) as failure:
        error = str(failure)
    return ScenarioResult(name=scenario.name, steps=steps, duration_s=time.monotonic() - began_s, error=error)


def _run_step(target: Target, judge: Judge, step: Step, began_s: float) -> StepResult:
    judge.prepare(judge.ask(step.load.requests, step.load.images), step.load.max_tokens)
    trigger = _Trigger(target, step.fault, began_s)
    started_s = time.monotonic()
    trigger.on_answers(0)
    samples = run_load(target, judge, step.load, began_s=began_s, on_answers=trigger.on_answers)
    duration_s = time.monotonic() - started_s
    trigger.finish()
    if trigger.error is not None:
        raise ClusterError(f"{step.name}: the fault could not be dealt: {trigger.error}") from trigger.error
    result = StepResult(
        name=step.name,
        samples=samples,
        broken_rules=[],
        started_s=started_s - began_s,
        duration_s=duration_s,
        fault=trigger.done,
        fault_s=trigger.at_s,
    )
    result.broken_rules.extend(_broken_rules(result, step, target))
    return result


def _broken_rules(result: StepResult, step: Step, target: Target) -> list[str]:
    expect, broken = step.expect, []
    wrong = [sample.wrong for sample in result.samples if sample.wrong]
    if wrong:
        broken.append(_several(f"{len(wrong)} of {len(result.samples)} answers are wrong", wrong))
    untyped = [sample.failure for sample in result.samples if sample.failure.startswith("broken")]
    if untyped:
        broken.append(_several(f"{len(untyped)} requests ended without a typed error", untyped))
    if result.num_failed > expect.max_failed:
        failures = [sample.failure for sample in result.samples if sample.failure]
        broken.append(_several(f"{result.num_failed} requests failed, at most {expect.max_failed} may", failures))
    if expect.max_ttft_ms and result.ttft_ms(0.5) > expect.max_ttft_ms:
        median = result.ttft_ms(0.5)
        broken.append(f"the median time to the first token is {median:.0f} ms, at most {expect.max_ttft_ms:g} may be")
    if step.fault is not None and not result.fault:
        broken.append(f"the fault never happened: fewer than {step.fault.after_answers} requests were answered")
    if expect.heals and (left := target.unhealed()):
        broken.append(f"it does not heal: {left}")
    return broken


def _several(what: str, cases: list[str]) -> str:
    more = f"; and {len(cases) - MAX_SHOWN} more" if len(cases) > MAX_SHOWN else ""
    return f"{what}: {'; '.join(cases[:MAX_SHOWN])}{more}"
