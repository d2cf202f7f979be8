"""Small engines on tiny checkpoints, and a loop that runs them to the end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from language_worker.api import GenerateRequest, RequestDone, RequestFailed, TokenChunk
from language_worker.config import EngineConfig
from language_worker.engine import Engine
from language_worker.engine_builder import build_engine
from language_worker.outputs import MediaAdmitted, PromptLogits, StepReport
from language_worker.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class ManualClock:
    """Monotonic seconds that move only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_engine(folder: Path, *, clock: Callable[[], float] | None = None, rows: int = 4096, **config: Any) -> Engine:
    config = {"dtype": "float32", "device": "cpu", "kv_cache_tokens": 2048, "max_model_len": 512, **config}
    extra = {} if clock is None else {"clock": clock}
    return build_engine(folder, EngineConfig(**config), input_buffer_tokens=rows, **extra)


@dataclass
class Result:
    """Everything one request put out."""

    chunks: list[TokenChunk] = field(default_factory=list)
    done: RequestDone | None = None
    error: Exception | None = None
    logits: torch.Tensor | None = None

    def tokens(self, index: int = 0) -> list[int]:
        return [t for chunk in self.chunks if chunk.index == index for t in chunk.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(chunk.text for chunk in self.chunks if chunk.index == index)

    def last(self, index: int = 0) -> TokenChunk:
        return [chunk for chunk in self.chunks if chunk.index == index][-1]


class Results(dict[str, Result]):
    """Results by request id; checks that nothing follows a request's end."""

    def take(self, report: StepReport) -> list[str]:
        """File the outputs of a step; returns ids whose media were admitted."""
        admitted = []
        for output in report.outputs:
            result = self.setdefault(output.request_id, Result())
            assert result.done is None and result.error is None, f"output after the end of {output.request_id}"
            if isinstance(output, TokenChunk):
                result.chunks.append(output)
            elif isinstance(output, PromptLogits):
                result.logits = output.logits
            elif isinstance(output, RequestDone):
                result.done = output
            elif isinstance(output, RequestFailed):
                result.error = output.error
            else:
                assert isinstance(output, MediaAdmitted)
                admitted.append(output.request_id)
        return admitted


@dataclass
class Media:
    """Media of one request: grids, and rows [total, hidden] in prompt order."""

    grids: list[tuple[int, int, int]]
    rows: torch.Tensor

    def items(self) -> list[dict[str, Any]]:
        return [{"grid": list(grid), "rows": grid[0] * grid[1] * grid[2] // 4} for grid in self.grids]

    def planes(self) -> tuple[torch.Tensor, ...]:
        """As the engine's buffer takes them, each [total, hidden]."""
        return (self.rows,)


def drive(
    engine: Engine,
    requests: Iterable[GenerateRequest],
    media: dict[str, Media] | None = None,
    *,
    on_step: Callable[[], None] | None = None,
) -> Results:
    """Submit everything, deliver media at once when admitted, run until nothing is left."""
    results, media = Results(), media or {}
    for request in requests:
        engine.submit(request)
        if request.request_id in media:
            own = media[request.request_id]
            engine.announce(request.request_id, own.rows.shape[0], own.items())
    idle = 0
    while idle < 2:
        report = engine.step()
        for request_id in results.take(report):
            buffer = engine.media_buffer(request_id)
            assert buffer is not None
            buffer.write(0, *media[request_id].planes())
        engine.scheduler.check_invariants()
        if on_step is not None:
            on_step()
        idle = 0 if report.did_run else idle + 1
    return results


def prompt(length: int, seed: int = 0, vocab: int = 300) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(vocab) for _ in range(length))


def request(name: str, ids: Sequence[int], sampling: SamplingParams = GREEDY, **values: Any) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=tuple(ids), sampling=sampling, **values)
