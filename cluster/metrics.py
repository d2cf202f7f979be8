"""Prometheus metrics: the gateway's own, and what the workers report, on one page.

Names carry the prefix `tandem:` and are otherwise those that serving engines use. The registry is the gateway's own,
never the process-wide one. Worker figures appear under a `worker` label; a worker that did not answer is `worker_up
0` and holds the page up no longer than its timeout. Knows nothing of HTTP beyond status codes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "tandem:"
WORKER_TIMEOUT_S = 1.0

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

WORKER_HELP = {
    "num_requests_running": "Requests that the engine computes on",
    "num_requests_waiting": "Requests that wait for the engine",
    "kv_cache_usage_perc": "Share of KV pages in use, 0 to 1",
    "kv_pages_referenced": "KV pages that live requests hold (caches excluded)",
    "kv_pages_cached": "KV pages that only the prefix cache holds",
    "kv_pages_swapped": "Pages in host memory that keep the KV of preempted sequences",
    "kv_pages_swapped_out_total": "KV pages of preempted sequences that left for host memory",
    "kv_pages_swapped_in_total": "KV pages of preempted sequences that came back from host memory",
    "prefix_cache_queries_total": "Tokens of admitted sequences, looked up in the prefix cache",
    "prefix_cache_hits_total": "Tokens whose KV the prefix cache had",
    "spec_decode_num_draft_tokens_total": "Tokens that speculative decoding guessed",
    "spec_decode_num_accepted_tokens_total": "Guessed tokens that were right",
    "kv_tokens_imported_total": "Positions whose KV was taken over from a prefill worker",
    "kv_row_bytes": "Bytes of one position's keys and values over all layers",
    "kv_buffer_rows_reserved": "Rows of KV between prefill and decode that host memory is reserved for",
    "kv_exports_open": "Prompts whose KV has not left completely",
    "transfer_blocks_in_use": "Receive blocks granted and not yet freed",
    "transfer_streams_open": "Block streams open",
    "transfer_tickets_open": "Tickets that can still be redeemed",
    "transfer_slots_fenced": "Shared slots that a peer which is lost may still write to",
    "transfer_streams_restarted_total": "Streams that started over with another sender's content",
    "embed_takeovers_total": "Tickets issued for another sender of a request's media, after the one before was lost",
    "computed_tokens_total": "Positions that the model computed, repeated ones included",
}

# Zero when nothing runs, on every worker that reports them.
LEDGER = (
    "transfer_blocks_in_use",
    "transfer_streams_open",
    "transfer_tickets_open",
    "transfer_slots_fenced",
    "kv_pages_referenced",
    "kv_pages_swapped",
    "kv_buffer_rows_reserved",
    "kv_exports_open",
)

WorkerStats = Mapping[str, Mapping[str, Any] | None]


async def gather_stats(
    calls: Mapping[str, Callable[[], Awaitable[Mapping[str, Any]]]], timeout_s: float = WORKER_TIMEOUT_S
) -> dict[str, Mapping[str, Any] | None]:
    """Ask all workers at once; None for one that failed or did not answer in time."""

    async def ask(call: Callable[[], Awaitable[Mapping[str, Any]]]) -> Mapping[str, Any] | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await call()
        except Exception:  # whatever is wrong with the worker, the page shows it as down
            return None

    answers = await asyncio.gather(*(ask(call) for call in calls.values()))
    return dict(zip(calls, answers, strict=True))


class GatewayMetrics:
    """The gateway's counters and histograms, and the page."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._known_workers: dict[str, None] = {}
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", _FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one sample", _TOKEN_BUCKETS
        )
        self.request_latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end", _REQUEST_BUCKETS
        )
        self._success = self._counter("request_success", "Samples by how they ended", ("finish_reason",))
        self._responses = self._counter("http_requests", "Responses by endpoint and status", ("endpoint", "status"))
        self._errors = self._counter("request_errors", "Failed requests by error code", ("code",))
        self._attempts = self._counter(
            "request_attempts", "Attempts to compute requests, by how the one before was lost", ("reason",)
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens")
        self.active_requests = Gauge(
            f"{PREFIX}gateway_requests_active", "Requests inside the gateway", registry=self._registry
        )
        for reason in ("stop", "length", "abort"):
            self._success.labels(reason)
        for reason in ("first", "PeerLost", "EngineFailed", "EngineStopped"):
            self._attempts.labels(reason)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self._registry)

    def count_finish(self, reason: str) -> None:
        self._success.labels(reason).inc()

    def count_response(self, endpoint: str, status: int) -> None:
        """`endpoint` is a route's path, never a client's: the label stays bounded."""
        self._responses.labels(endpoint, str(status)).inc()

    def count_attempt(self, reason: str) -> None:
        """`reason`: "first", or the code of the loss after which a request is computed anew. From any thread."""
        self._attempts.labels(reason).inc()

    def count_error(self, code: str) -> None:
        self._errors.labels(code).inc()

    async def page(
        self, worker_stats: Callable[[], Awaitable[WorkerStats]], timeout_s: float = WORKER_TIMEOUT_S
    ) -> bytes:
        """The page in Prometheus' text format; workers have `timeout_s` to answer."""
        stats: WorkerStats = {}
        try:
            async with asyncio.timeout(2 * timeout_s):  # one late worker takes all of its time, and is alone down then
                stats = await worker_stats()
        except Exception:  # as in gather_stats: the page must come, and shows the workers as down
            stats = dict.fromkeys(self._known_workers)
        self._known_workers = dict.fromkeys(stats)
        registry = CollectorRegistry()
        registry.register(_WorkerCollector(stats))
        return generate_latest(self._registry) + generate_latest(registry)


class _WorkerCollector(Collector):
    """Worker stats as metric families: `x_total` are counters, all else gauges; a map's keys become a label."""

    def __init__(self, stats: WorkerStats) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily(f"{PREFIX}worker_up", "Did the worker answer in time", labels=("worker",))
        families: dict[tuple[str, bool], _Family] = {}
        for worker, stats in self._stats.items():
            up.add_metric((worker,), 0 if stats is None else 1)
            for name, value in (stats or {}).items():
                _add(families, worker, name, value)
        return [up, *families.values()]


_GATEWAY_NAMES = frozenset({"prompt_tokens_total", "generation_tokens_total", "request_success_total"})
_Family = GaugeMetricFamily | CounterMetricFamily


def _add(families: dict[tuple[str, bool], _Family], worker: str, name: str, value: object) -> None:
    """Add one worker's figure; what is no number, or has no proper name, is left out."""
    is_map = isinstance(value, Mapping)
    samples = value if isinstance(value, Mapping) else {"": value}
    numbers = {key: float(number) for key, number in samples.items() if isinstance(number, (int, float))}
    if not numbers or not (name.isidentifier() and name.isascii()):
        return
    full = f"{PREFIX}worker_{name}" if name in _GATEWAY_NAMES else PREFIX + name
    family = families.get((full, is_map))
    if family is None:
        if (full, not is_map) in families:  # one worker reports a number, another a map: the first one's shape counts
            return
        kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
        key_label = "finish_reason" if "request_success" in name else "key"
        labels = ("worker", key_label) if is_map else ("worker",)
        family = families[full, is_map] = kind(full, WORKER_HELP.get(name, "Reported by the workers"), labels=labels)
    for key, number in numbers.items():
        family.add_metric((worker, str(key)) if is_map else (worker,), number)
