"""The shipped model that fills in masks, on a prefill and a decode worker of a cluster."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cluster.config import build_config
from cluster.demo import DIFFUSION_MODEL_DIR, SUMS, answer_to_sums
from cluster.launch import RayCluster
from tests.e2e.conftest import cluster_tree
from tests.e2e.serving import Serving, chat_body
from tests.waiting import eventually

pytestmark = pytest.mark.ray

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"kv_policy": "prefix"},
    {"kv_policy": "none"},
    {"schedule": "static", "refresh_interval": 3},
)


def test_a_split_cluster_does_sums(ray_cluster: RayCluster) -> None:
    """Every policy, whole and streamed, clients that leave, and nothing held afterwards."""
    tree = cluster_tree(prefill=1, decode=1)
    tree["model"]["path"] = str(DIFFUSION_MODEL_DIR)
    tree["language"].pop("max_model_len")
    bodies = [
        chat_body(question, max_tokens=32, diffusion={"block_length": 8, **kind}) for question in SUMS for kind in KINDS
    ]
    with RayCluster(build_config(tree).resolve()) as cluster, Serving(cluster.url) as serving:
        with ThreadPoolExecutor(8) as pool:
            leavers = [pool.submit(_leave_early, serving, body) for body in bodies[:4]]
            answers = list(pool.map(serving.ask, bodies))
            for leaver in leavers:
                leaver.result()
        for body, answer in zip(bodies, answers, strict=True):
            question = body["messages"][0]["content"][0]["text"]
            assert answer["choices"][0]["message"]["content"] == answer_to_sums(question)
            hops = _whole_hops(serving, body, answer)
            assert (hops["prefill_worker"], hops["language_worker"]) == ("prefill-0", "decode-0")
            assert (hops["kv_bytes"] > 0) == (body["diffusion"].get("kv_policy") != "none")
        assert serving.stream(bodies[0]).text == answer_to_sums(SUMS[0])
        assert serving.settled()["decode-0"]["kv_tokens_imported_total"] > 0
        serving.await_empty_ledger()


def _whole_hops(serving: Serving, body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """What each hop did. The prefill worker's figures may come after the last token: then it is asked once more."""

    def asked_again() -> dict[str, Any] | None:
        hops: dict[str, Any] = serving.ask(body)["usage"]["hops"]
        return hops if "kv_bytes" in hops else None

    hops: dict[str, Any] = answer["usage"]["hops"]
    return hops if "kv_bytes" in hops else eventually(asked_again, "the figures of a hop are always missing")


def _leave_early(serving: Serving, body: dict[str, Any]) -> None:
    """A client that reads the beginning of a long answer."""
    long = {**body, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with serving.events(long) as events:
        next(events)
