"""What the routes of one gateway share: its context, metrics, limits and a few threads for heavy parsing.

Limits are counted here and never waited for: a request that does not fit is refused at once. Request ids are made here.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata

from cluster.errors import ModelNotFound, Overloaded
from cluster.gateway.body import BodyBudget
from cluster.gateway.context import GatewayContext
from cluster.gateway.generation import Generation
from cluster.gateway.media_fetch import MediaFetcher

NUM_PARSE_THREADS = 4
BODY_BUDGET_FACTOR = 4  # all running requests together may hold so many bodies of the largest size


class GatewayState:
    """One gateway's shared things; belongs to the event loop's thread (but for `check_model`)."""

    def __init__(self, context: GatewayContext) -> None:
        self.context = context
        self.metrics = context.metrics
        self.budget = BodyBudget(BODY_BUDGET_FACTOR * context.config.max_body_bytes)
        self.fetcher = MediaFetcher(
            context.config.media_rules,
            max_bytes=context.config.max_image_bytes,
            timeout_s=context.config.media_timeout_s,
        )
        self.threads = ThreadPoolExecutor(max_workers=NUM_PARSE_THREADS, thread_name_prefix="gateway-parse")
        self.created = int(time.time())
        self.version = _version()
        self.fingerprint = f"tandem-{self.version}"
        self.num_active = 0
        self._running: set[Generation] = set()

    @contextmanager
    def generation(self, *, max_buffered: int | None) -> Iterator[Generation]:
        """What gathers one request's answer; whatever still runs of it is cancelled at the end."""
        generation = Generation(max_buffered=max_buffered)
        self._running.add(generation)
        try:
            yield generation
        finally:
            self._running.discard(generation)
            generation.cancel()

    def end_running(self, error: Exception) -> None:
        """Every request that is being answered ends with this error; from any thread."""
        for generation in tuple(self._running):
            generation.fail(error)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold one of the places for requests; raises Overloaded if all are taken."""
        limit = self.context.config.max_concurrent_requests
        if self.num_active >= limit:
            raise Overloaded(f"{limit} requests are running, which is this gateway's limit")
        self.num_active += 1
        self.metrics.active_requests.set(self.num_active)
        try:
            yield
        finally:
            self.num_active -= 1
            self.metrics.active_requests.set(self.num_active)

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound unless it is ours; None stands for whatever is served."""
        served = self.context.model_name
        if name is not None and name != served:
            raise ModelNotFound(f"the model {name[:200]!r} does not exist; this server has {served!r}", "model")

    def close(self) -> None:
        """Let the parsing threads end. Idempotent."""
        self.threads.shutdown(wait=False, cancel_futures=True)


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _version(lookup: Callable[[str], str] = metadata.version) -> str:
    try:
        return lookup("tandem-serve")
    except metadata.PackageNotFoundError:  # runs from a folder, not installed
        return "0.1"
