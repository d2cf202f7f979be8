"""One request inside the pipeline: what the pipeline asks of it, and the run that brings it its rows in order.

Knows nothing of models, queues or streams.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from embedding_worker.api import EmbedItem, EncodeSummary
from embedding_worker.errors import EmbedDeadline, EmbedError

logger = logging.getLogger(__name__)

Media = bytes | memoryview


class EmbedJob(Protocol):
    """A request as the pipeline sees it. Callbacks come from the pipeline's threads, never two at a time, and end with
    exactly one of on_encoded or on_failed, unless the job is dead by then."""

    @property
    def media(self) -> Sequence[Media]:
        """Encoded images in prompt order."""
        ...

    @property
    def deadline(self) -> float:
        """`time.monotonic` by which it must be done."""
        ...

    @property
    def first_row(self) -> int:
        """Rows below are not wanted: their receiver has them. Known when the job is submitted."""
        ...

    def is_alive(self) -> bool:
        """False once nobody wants the rows any more."""
        ...

    def on_items(self, items: tuple[EmbedItem, ...]) -> None:
        """All grids are known; nothing is decoded yet."""
        ...

    def on_rows(self, first_row: int, rows: torch.Tensor) -> None:
        """The next rows [n, embedding_dim], or [n, planes, embedding_dim], in prompt order; they are shared with
        others, so read only.

        Media that lie below `first_row` as a whole are left out.
        """
        ...

    def on_encoded(self, summary: EncodeSummary) -> None:
        """All rows were handed over."""
        ...

    def on_failed(self, error: EmbedError) -> None:
        """The request cannot be fulfilled; nothing follows."""
        ...


class Run:
    """One job on its way: collects rows and hands them over in prompt order."""

    def __init__(self, job: EmbedJob, on_done: Callable[[Run], None]) -> None:
        self.job = job
        self.num_bytes = sum(len(media) for media in job.media)
        self._on_done = on_done
        self._lock = threading.Lock()
        self._ready: dict[int, torch.Tensor | int] = {}  # or the number of rows that are left out
        self._num_delivered = self._num_rows = self._num_hits = 0
        self._preprocess_s = self._encode_s = 0.0
        self.is_over = self.is_failed = False

    def check(self) -> bool:
        """Whether rows are still wanted; ends the run when its job died, fails it when its time ran out."""
        if not self.is_over and not self.job.is_alive():
            self._end(is_failure=False)
        elif not self.is_over and time.monotonic() > self.job.deadline:
            self.fail(EmbedDeadline("it waited for the vision model"))
        return not self.is_over

    def deliver(self, index: int, rows: torch.Tensor, preprocess_s: float, encode_s: float, is_hit: bool) -> None:
        """Take in the rows of item `index`, and hand over what is next in order. Seconds: this run's share of work."""
        with self._lock:
            if self.is_over:
                return
            self._preprocess_s += preprocess_s
            self._encode_s += encode_s
            self._num_hits += is_hit
            self._ready[index] = rows
            self.is_over = self._hand_over()
            if not self.is_over:
                return
        self._finish()

    def leave_out(self, index: int, num_rows: int) -> None:
        """The rows of item `index` are not wanted."""
        with self._lock:
            if self.is_over:
                return
            self._ready[index] = num_rows
            self.is_over = self._hand_over()
            if not self.is_over:
                return
        self._finish()

    def _hand_over(self) -> bool:
        """All that is next in order; whether that was the last."""
        while (rows := self._ready.pop(self._num_delivered, None)) is not None:
            num_rows = rows if isinstance(rows, int) else rows.shape[0]
            if not isinstance(rows, int):
                self.job.on_rows(self._num_rows, rows)
            self._num_delivered += 1
            self._num_rows += num_rows
        return self._num_delivered == len(self.job.media)

    def _finish(self) -> None:
        self._on_done(self)
        self.job.on_encoded(
            EncodeSummary(
                preprocess_ms=self._preprocess_s * 1e3,
                encode_ms=self._encode_s * 1e3,
                num_rows=self._num_rows,
                num_cache_hits=self._num_hits,
            )
        )

    def fail(self, error: EmbedError) -> None:
        """End the run with an error, unless it is over."""
        if not self._end(is_failure=True):
            return
        try:
            self.job.on_failed(error)
        except Exception:  # the pipeline's threads outlive any job
            logger.exception("a job failed to take its failure")

    def _end(self, *, is_failure: bool) -> bool:
        """Mark the run over and leave the pipeline; False when that was done before."""
        with self._lock:
            if self.is_over:
                return False
            self.is_over = True
            self.is_failed = is_failure
        self._on_done(self)
        return True
