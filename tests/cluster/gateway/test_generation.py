"""The bridge from threads to the event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import SlowReader
from cluster.gateway.generation import Generation
from cluster.served import ServedRequest
from language_worker.sampling_params import SamplingParams
from tests.cluster.gateway.harness import FakeHandoff, Running, chunk, run, stats_for


def served(number: int) -> ServedRequest:
    return ServedRequest(
        request_id=f"r{number}", prompt_token_ids=(1,), media=(), sampling=SamplingParams(), timeout_s=60.0
    )


@settings(max_examples=25, derandomize=True, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=5), fails=st.integers(-1, 4))
def test_every_chunk_arrives_once_and_in_order(counts: list[int], fails: int) -> None:
    def script(running: Running, sink: Any) -> None:
        number = int(running.request.request_id[1:])
        for i in range(counts[number]):
            sink.on_chunk(chunk(running.request, 0, str(i)))
        if number == fails:
            sink.on_error(ValueError("broken"))
        else:
            sink.on_end(stats_for(running.request, counts[number]))

    async def main() -> None:
        handoff = FakeHandoff(script)
        generation = Generation()
        generation.start(handoff, [served(i) for i in range(len(counts))])
        seen: dict[int, list[str]] = {i: [] for i in range(len(counts))}

        async def consume() -> None:
            while events := await generation.next_events():
                for event in events:
                    seen[event.prompt].append(event.chunk.text)

        if fails in seen:
            with pytest.raises(ValueError, match="broken"):
                await consume()
            assert seen[fails] == [str(i) for i in range(counts[fails])]
            assert all(running.cancelled.is_set() for running in handoff.submitted)
        else:
            await consume()
            assert seen == {i: [str(k) for k in range(count)] for i, count in enumerate(counts)}
            assert generation.stats.keys() == seen.keys()
        await asyncio.to_thread(handoff.join)

    run(main())


def test_many_chunks_cost_one_wake_up() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        wakes = 0
        original = loop.call_soon_threadsafe

        def counting(callback: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal wakes
            wakes += getattr(callback, "__name__", "") == "_on_wake"
            return original(callback, *args, **kwargs)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
        generation = Generation()
        for i in range(1000):  # from this thread: the loop cannot look in between
            generation.push(0, chunk(served(0), 0, str(i)))
        assert wakes == 1
        assert len(await generation.next_events()) == 1000
        generation.push(0, chunk(served(0), 0, "again"))
        assert wakes == 2

    run(main())


def test_the_buffer_is_bounded() -> None:
    async def main() -> None:
        generation = Generation(max_buffered=10)
        cancelled = threading.Event()
        generation._running.append(type("Running", (), {"cancel": lambda self: cancelled.set()})())
        for i in range(1000):
            generation.push(0, chunk(served(0), 0, str(i)))
        assert len(await generation.next_events()) == 10
        with pytest.raises(SlowReader):
            await generation.next_events()
        assert cancelled.is_set()

    run(main())


def test_a_closed_loop_is_no_error_for_the_worker_thread() -> None:
    made: list[Generation] = []

    async def main() -> None:
        made.append(Generation())

    asyncio.run(main())
    made[0].push(0, chunk(served(0), 0, "late"))
    made[0].fail(ValueError("late"))
