"""Waiting until the workers of an `LLM` hold nothing any more."""

from __future__ import annotations

from collections.abc import Sequence

from cluster import LLM
from tests.waiting import eventually

LEDGER = (
    "transfer_blocks_in_use", "transfer_streams_open", "transfer_tickets_open", "transfer_streams_sending",
    "kv_pages_referenced", "num_requests_running", "num_requests_waiting", "input_buffer_rows_reserved",
    "calls_incoming", "calls_outgoing", "embed_requests_open", "embed_patches_waiting",
)  # fmt: skip
TIMEOUT_S = 120.0


def await_empty(llm: LLM, names: Sequence[str] = LEDGER) -> None:
    """The ledger comes to zero: what was cancelled is freed within a step, last acknowledgements may be on their way.
    Each name is some worker's."""

    def left() -> dict[tuple[str, str], float]:
        stats = llm.stats()
        known = {name for worker in stats.values() for name in worker}
        assert known >= set(names), f"nobody tells of {set(names) - known}"
        return {(who, name): worker[name] for who, worker in stats.items() for name in names if worker.get(name)}

    eventually(lambda: not left(), lambda: f"left behind: {left()}", TIMEOUT_S)
