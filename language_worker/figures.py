"""The gauges and counters of an engine, by the names under which /metrics shows them."""

from __future__ import annotations

from language_worker.roster import Roster
from language_worker.scheduler import Scheduler

COUNTERS = (
    "prompt_tokens_total", "generation_tokens_total", "request_success_total", "request_failure_total",
    "num_preemptions_total", "computed_tokens_total", "kv_pages_swapped_out_total", "kv_pages_swapped_in_total",
    "kv_tokens_imported_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
)  # fmt: skip


def figures(scheduler: Scheduler, roster: Roster, kv_row_bytes: int) -> dict[str, float]:
    """On the engine's thread: what is held now, and what was counted so far."""
    pool, cache, swap = scheduler.pool, scheduler.pages.cache, scheduler.pages.swap
    return {
        "num_requests_running": roster.num_running,
        "num_requests_waiting": roster.num_waiting,
        "kv_cache_usage_perc": pool.num_in_use / pool.num_pages,
        "kv_pages_referenced": pool.num_in_use,
        "kv_pages_cached": pool.num_idle,
        "kv_pages_swapped": 0 if swap is None else swap.num_in_use,
        "prefix_cache_queries_total": 0 if cache is None else cache.num_queried,
        "prefix_cache_hits_total": 0 if cache is None else cache.num_hit,
        "input_buffer_rows_reserved": roster.num_rows_reserved,
        "kv_row_bytes": kv_row_bytes,
        "kv_buffer_rows_reserved": roster.handovers.num_rows_reserved,
        **{name: roster.counters[name] for name in COUNTERS},
    }
