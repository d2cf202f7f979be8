"""Worker statistics on the metrics page."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import GatewayMetrics, gather_stats


def parsed(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a page; a name that stands twice is an error."""
    families = list(text_string_to_metric_families(page.decode()))
    assert len({family.name for family in families}) == len(families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_a_silent_worker_is_marked_down_and_holds_nothing_up() -> None:
    async def answers() -> Mapping[str, Any]:
        return {"transfer_blocks_in_use": 3}

    async def hangs() -> Mapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def breaks() -> Mapping[str, Any]:
        raise ConnectionError("gone")

    async def main() -> None:
        calls = {"good": answers, "hung": hangs, "broken": breaks}
        stats = await gather_stats(calls, timeout_s=0.05)
        assert stats == {"good": {"transfer_blocks_in_use": 3}, "hung": None, "broken": None}
        metrics = GatewayMetrics()

        async def known() -> Mapping[str, Mapping[str, Any] | None]:
            return stats

        samples = parsed(await metrics.page(known))
        assert samples["tandem:worker_up", (("worker", "good"),)] == 1
        assert samples["tandem:worker_up", (("worker", "hung"),)] == 0
        assert samples["tandem:transfer_blocks_in_use", (("worker", "good"),)] == 3

        samples = parsed(await metrics.page(lambda: gather_stats(calls, timeout_s=0.2), timeout_s=60.0))
        assert samples["tandem:worker_up", (("worker", "good"),)] == 1, "a silent worker takes nobody with it"
        assert samples["tandem:worker_up", (("worker", "hung"),)] == 0

        async def stuck() -> Mapping[str, Mapping[str, Any] | None]:
            await asyncio.Event().wait()
            return {}

        samples = parsed(await metrics.page(stuck, timeout_s=0.05))
        assert samples["tandem:worker_up", (("worker", "good"),)] == 0

    asyncio.run(main())


def test_odd_figures_do_not_break_the_page() -> None:
    async def odd() -> Mapping[str, Mapping[str, Any] | None]:
        return {
            'w"1\n': {"a b": 1, "ok": True, "text": "x", "request_success_total": {"stop": 2, "length": 1}, "mixed": 1},
            "w2": {"mixed": {"x": 1}, "nothing": None, "kv_cache_usage_perc": 0.5, "steps_total": 4},
        }

    samples = parsed(asyncio.run(GatewayMetrics().page(odd)))
    assert samples["tandem:ok", (("worker", 'w"1\n'),)] == 1
    labels = (("finish_reason", "stop"), ("worker", 'w"1\n'))
    assert samples["tandem:worker_request_success_total", labels] == 2
    assert samples["tandem:kv_cache_usage_perc", (("worker", "w2"),)] == 0.5
    assert samples["tandem:steps_total", (("worker", "w2"),)] == 4


def test_two_gateways_in_one_process_do_not_share_figures() -> None:
    async def none() -> Mapping[str, Mapping[str, Any] | None]:
        return {}

    one, other = GatewayMetrics(), GatewayMetrics()
    one.count_finish("stop")
    key = ("tandem:request_success_total", (("finish_reason", "stop"),))
    assert parsed(asyncio.run(one.page(none)))[key] == 1
    assert parsed(asyncio.run(other.page(none)))[key] == 0
