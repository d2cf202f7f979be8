"""From a request's media to its rows: inspect, decode, batch, encode, deliver in order.

    submit ──> inspect (1 thread): headers, grids, content keys ──> on_items
                   │ what is neither cached nor under way
                   v
               decode (n threads), held back while two batches of patches wait
                   v
               encode (1 thread): next batch under the patch budget ──> cache, on_rows in prompt order

Equal media are decoded and encoded once, however many requests wait for them. Work that nobody waits for any more is
dropped at each border. Knows jobs by their callbacks; knows nothing of calls, tickets or streams.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch

from embedding_worker.api import EmbedItem
from embedding_worker.batcher import PatchBatcher
from embedding_worker.cache import CachedMedium, EmbeddingCache
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import (
    EmbedError,
    EmbedQueueFull,
    EmbedStopped,
    EncodeFailed,
    ImageError,
)
from embedding_worker.job import EmbedJob, Media, Run
from embedding_worker.preprocess import ImageLimits, PreparedImage, inspect_image, prepare_image
from embedding_worker.runner import VisionRunner

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Work:
    """One distinct medium under way, and who waits for it as which item: (run, index, first to ask)."""

    key: str
    media: Media
    waiters: list[tuple[Run, int, bool]]
    image: PreparedImage | None = None
    decode_s: float = 0.0


class EmbedPipeline:
    """Runs jobs against one model. `start` and `close` once each; `submit` from any thread."""

    def __init__(self, runner: VisionRunner, config: EmbedConfig) -> None:
        self._runner = runner
        self._config = config
        self._limits = ImageLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)
        self._cache = EmbeddingCache(config.cache_tokens)
        self._batcher: PatchBatcher[str] = PatchBatcher(config.max_batch_patches)
        self._works: dict[str, _Work] = {}
        self._runs: set[Run] = set()
        self._changed = threading.Condition()  # guards everything above and below
        self._num_bytes = 0
        self._counts = dict.fromkeys(("embed_items_encoded", "embed_cache_hits", "embed_requests", "embed_failures"), 0)
        self._is_closing = False
        self._inspector = concurrent.futures.ThreadPoolExecutor(1, "embed-inspect")
        self._decoder = concurrent.futures.ThreadPoolExecutor(config.num_preprocess_threads, "embed-decode")
        self._encoder = threading.Thread(target=self._encode_loop, name="embed-encode", daemon=True)

    def start(self) -> None:
        """Start encoding."""
        self._encoder.start()

    def close(self) -> None:
        """Stop all threads; jobs that are not done fail. Idempotent."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify_all()
            runs = list(self._runs)
        for run in runs:
            run.fail(EmbedStopped())
        self._inspector.shutdown(cancel_futures=True)
        self._decoder.shutdown(cancel_futures=True)
        if self._encoder.is_alive():
            self._encoder.join()

    @property
    def is_alive(self) -> bool:
        """Whether the encoding thread runs."""
        return self._encoder.is_alive()

    def submit(self, job: EmbedJob) -> None:
        """Queue a job. Raises EmbedQueueFull or EmbedStopped; the job then hears nothing."""
        run = Run(job, self._forget)
        with self._changed:
            if self._is_closing:
                raise EmbedStopped()
            if len(self._runs) >= self._config.max_waiting_requests:
                raise EmbedQueueFull(self._config.max_waiting_requests, "requests")
            if self._num_bytes + run.num_bytes > self._config.max_waiting_bytes:
                raise EmbedQueueFull(self._config.max_waiting_bytes, "bytes")
            self._runs.add(run)
            self._num_bytes += run.num_bytes
            self._counts["embed_requests"] += 1
            self._inspector.submit(self._guarded, [run], self._inspect, run)

    def stats(self) -> dict[str, int]:
        """Counters, and what waits now."""
        with self._changed:
            return {
                **self._counts,
                "embed_requests_open": len(self._runs),
                "embed_patches_waiting": self._batcher.num_patches,
                "embed_cache_rows": self._cache.num_rows,
            }

    def _forget(self, run: Run) -> None:
        with self._changed:
            if run in self._runs:
                self._runs.remove(run)
                self._num_bytes -= run.num_bytes
                self._counts["embed_failures"] += run.is_failed

    def _guarded(self, runs: Sequence[Run], step: Callable[..., None], *args: object) -> None:
        """Run a step of a thread pool; whatever it raises fails the runs it was for, and never the thread."""
        try:
            step(*args)
        except Exception as error:  # the border of a thread: nothing may pass unseen
            if not isinstance(error, EmbedError):
                logger.exception("embedding step failed")
                error = EncodeFailed(f"{type(error).__name__}: {error}")
            for run in runs:
                run.fail(error)

    def _inspect(self, run: Run) -> None:
        if not run.check():
            return
        settings = self._runner.settings
        items, known = [], []
        for index, media in enumerate(run.job.media):
            key = self._runner.content_key(media) if len(media) <= self._limits.max_bytes else ""
            with self._changed:
                cached = self._cache.get(key)
            grid = cached.grid if cached else inspect_image(media, index, settings, self._limits)
            items.append(EmbedItem(grid=grid, num_rows=self._runner.num_rows(grid), content_key=key))
            known.append(cached)
        run.job.on_items(tuple(items))
        end_row = 0
        for index, (item, cached) in enumerate(zip(items, known, strict=True)):
            end_row += item.num_rows
            if end_row <= run.job.first_row:
                run.leave_out(index, item.num_rows)
            else:
                self._request(run, index, item, cached)

    def _request(self, run: Run, index: int, item: EmbedItem, cached: CachedMedium | None) -> None:
        """Deliver a cached medium, join work under way, or begin it."""
        with self._changed:
            cached = cached or self._cache.get(item.content_key)
            work = self._works.get(item.content_key)
            if cached is not None or work is not None:
                self._counts["embed_cache_hits"] += 1
            if cached is None and work is not None:
                work.waiters.append((run, index, False))
            elif cached is None:
                work = _Work(key=item.content_key, media=run.job.media[index], waiters=[(run, index, True)])
                self._works[item.content_key] = work
                if not self._is_closing:
                    self._decoder.submit(self._decode, work)
        if cached is not None:
            run.deliver(index, cached.rows, 0.0, 0.0, True)

    def _decode(self, work: _Work) -> None:
        if self._drop_if_unwanted(work):
            return
        started = time.monotonic()
        try:
            work.image = prepare_image(work.media, 0, self._runner.settings, self._limits)
        except ImageError as error:
            self._fail_work(work, error)
            return
        except Exception as error:  # the border of a thread: nothing may pass unseen
            logger.exception("decoding failed")
            self._fail_work(work, EncodeFailed(f"{type(error).__name__}: {error}"))
            return
        work.decode_s = time.monotonic() - started
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closing or self._batcher.num_patches < 2 * self._config.max_batch_patches
            )
            self._batcher.add(work.key, work.image.patches.shape[0])
            self._changed.notify_all()

    def _drop_if_unwanted(self, work: _Work) -> bool:
        for run, _, _ in list(work.waiters):
            run.check()
        with self._changed:
            if any(not run.is_over for run, _, _ in work.waiters):
                return False
            del self._works[work.key]
            return True

    def _fail_work(self, work: _Work, error: EmbedError) -> None:
        with self._changed:
            del self._works[work.key]
        for run, index, _ in work.waiters:
            run.fail(type(error)(index, error.reason) if isinstance(error, ImageError) else error)

    def _encode_loop(self) -> None:
        if self._config.num_threads:
            torch.set_num_threads(self._config.num_threads)
        self._runner.warm_up()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or len(self._batcher))
                if self._is_closing:
                    return
                works = [self._works[key] for key in self._batcher.next_batch()]
                self._changed.notify_all()
            wanted = [work for work in works if not self._drop_if_unwanted(work)]
            runs = [run for work in wanted for run, _, _ in work.waiters]
            if wanted:
                self._guarded(runs, self._encode, wanted)

    def _encode(self, works: Sequence[_Work]) -> None:
        images = [work.image for work in works if work.image is not None]
        started = time.monotonic()
        try:
            encoded = self._runner.encode(images)
        except Exception as error:  # out of memory, a bad kernel: the worker must outlive it
            logger.exception("encoding %d images failed", len(works))
            if len(works) > 1:
                for work in works:
                    self._encode([work])
            else:
                self._fail_work(works[0], EncodeFailed(f"{type(error).__name__}: {error}"))
            return
        seconds = time.monotonic() - started
        num_patches = sum(image.patches.shape[0] for image in images)
        for work, image, rows in zip(works, images, encoded, strict=True):
            with self._changed:
                self._cache.put(work.key, CachedMedium(rows=rows, grid=image.grid))
                del self._works[work.key]
                self._counts["embed_items_encoded"] += 1
            share = seconds * image.patches.shape[0] / num_patches
            for run, index, is_first in work.waiters:
                spent = (work.decode_s, share) if is_first else (0.0, 0.0)
                self._guarded([run], run.deliver, index, rows, *spent, not is_first)
