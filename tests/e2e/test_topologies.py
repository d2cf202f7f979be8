"""Whatever workers a cluster is made of, it gives the answers of one process, and holds nothing afterwards.

1E·1L, 2E·2L (in `test_cluster_faults`, which has one) and 1E·1P·1D, with tiny receive pools and a KV cache in
which not all fit: images and text, samples, seeds, stop strings, and clients that go away.
"""

from __future__ import annotations

import functools
import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cluster import LLM, SamplingParams
from cluster.launch import RayCluster
from tests.e2e.conftest import cluster_tree
from tests.e2e.serving import Serving, chat_body, long_body, png
from tests.profiles import IS_SOAK
from tests.tiny_models import random_image
from tests.waiting import eventually

pytestmark = pytest.mark.ray

NUM_REQUESTS = 200 if IS_SOAK else 12
SAMPLED = ("temperature", "seed", "n", "stop", "max_tokens", "ignore_eos", "logit_bias", "top_p", "frequency_penalty")


def _body(index: int) -> dict[str, Any]:
    """The index-th request, unlike all others."""
    rng = random.Random(index)
    images = [
        png(random_image(rng.randrange(28, 200), rng.randrange(28, 200), seed=index + i)) for i in range(index % 4)
    ]
    text = " ".join(
        rng.choice(("What", "number", "is", "this", "how", "many", "digits")) for _ in range(1 + index % 40)
    )
    fields: dict[str, Any] = [
        {},
        {"temperature": 1.0, "seed": index, "n": 3},
        {"temperature": 0.9, "seed": index, "top_p": 0.8, "stop": ["1", "77"]},
        {"temperature": 0, "frequency_penalty": 0.7},
    ][index // 4 % 4]
    return long_body(f"{text} {index}", 4 + index % 30, *images, **fields)


@functools.cache
def _expected() -> list[list[tuple[str, str | None]]]:
    """(text, finish reason) of every choice, by one process."""
    tree = cluster_tree()
    bodies = [_body(i) for i in range(NUM_REQUESTS)]
    params = [SamplingParams(**{k: _plain(k, body[k]) for k in SAMPLED if k in body}) for body in bodies]
    with LLM(tree["model"]["path"], dtype="float32", device="cpu", language=tree["language"]) as llm:
        answers = llm.chat([body["messages"] for body in bodies], params)
    return [[(o.text, o.finish_reason) for o in answer.outputs] for answer in answers]


def _plain(name: str, value: Any) -> Any:
    return {int(token_id): bias for token_id, bias in value.items()} if name == "logit_bias" else value


@pytest.mark.parametrize("name", ["ray_cluster", "split_cluster"])
def test_a_topology_answers_as_one_process_does(name: str, request: pytest.FixtureRequest) -> None:
    check_topology(request.getfixturevalue(name), is_split=name == "split_cluster")


def check_topology(cluster: RayCluster, *, is_split: bool) -> None:
    """Every answer, with clients that leave meanwhile; nothing is left."""
    with Serving(cluster.url) as serving, ThreadPoolExecutor(12) as pool:
        leavers = [pool.submit(_leave_early, serving, i) for i in range(NUM_REQUESTS // 8)]
        answers = list(pool.map(serving.ask, [_body(i) for i in range(NUM_REQUESTS)]))
        for leaver in leavers:
            leaver.result()
        for i, (answer, right) in enumerate(zip(answers, _expected(), strict=True)):
            got = [(choice["message"]["content"], choice["finish_reason"]) for choice in answer["choices"]]
            assert got == right, f"request {i} on {sorted(cluster.workers)}"
        serving.await_empty_ledger()
        figures = serving.settled()
        assert (sum(worker.startswith("decode") for worker in figures) == 1) == is_split
        if is_split:
            assert figures["decode-0"]["kv_tokens_imported_total"] > 0
            assert figures["prefill-0"]["transfer_streams_sent_total"] >= NUM_REQUESTS


def _leave_early(serving: Serving, index: int) -> None:
    """A client that reads the beginning of a long answer."""
    images = [png(random_image(90, 60, seed=5000 + index))] if index % 2 else []
    with serving.events(long_body(f"Go on {index}", 900, *images)) as events:
        next(events)


def test_a_split_cluster_says_what_each_hop_did(split_cluster: RayCluster) -> None:
    seeds = itertools.count(1)

    def whole_hops() -> dict[str, Any] | None:
        """Of a fresh picture; None where the figures of a hop came too late for the answer, which does not wait."""
        body = chat_body("What number is this?", png(random_image(90, 60, seed=next(seeds))))
        hops: dict[str, Any] = serving.ask(body)["usage"]["hops"]
        assert (hops["prefill_worker"], hops["language_worker"]) == ("prefill-0", "decode-0")
        return hops if {"kv_bytes", "rows"} <= hops.keys() else None

    with Serving(split_cluster.url) as serving:
        hops = eventually(whole_hops, "the figures of a hop are always missing")
        assert hops["kv_bytes"] > 0 and hops["kv_blocks"] > 0 and hops["rows"] > 0
        serving.await_empty_ledger()
