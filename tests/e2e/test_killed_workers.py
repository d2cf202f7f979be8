"""kill -9: who sees it first tells the gateway, and nobody waits for a silence.

The endpoints are given an hour before they call a silent peer lost, and a killed worker cannot come back while its
checkpoint is away: whatever happens here, the word of who watches the processes is what made it happen.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.config import build_config
from cluster.launch import RayCluster
from tests.e2e.serving import Serving
from tests.tiny_text_models import make_text_model
from tests.waiting import eventually

pytestmark = pytest.mark.ray

HOUR_S = 3600.0
HEALED_S = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("killed") / "model", "qwen2")


@pytest.fixture(scope="module")
def patient_cluster(ray_cluster: RayCluster, folder: Path) -> Iterator[RayCluster]:
    """Two language workers that no silence ends."""
    tree: dict[str, Any] = {
        "model": {"path": str(folder), "served_model_name": "tiny", "dtype": "float32", "device": "cpu"},
        "language": {"num_threads": 1, "kv_cache_tokens": 2048},
        "transfer": {"peer_timeout_s": HOUR_S, "idle_timeout_s": HOUR_S},
        "gateway": {"port": 0},
        "workers": {"language": 2, "num_cpus": 0.1, "health_timeout_s": HOUR_S},
    }
    with RayCluster(build_config(tree).resolve()) as cluster:
        yield cluster


def _ask(serving: Serving, seed: int) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True, "seed": seed}
    response = serving.client.post("/v1/completions", json=body, timeout=HEALED_S)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_an_answer_does_not_wait_for_a_silence_and_none_is_promised_without_workers(
    patient_cluster: RayCluster, folder: Path
) -> None:
    away = folder.with_name("away")
    victims = patient_cluster.workers
    with Serving(patient_cluster.url) as serving, ThreadPoolExecutor(2) as pool:
        expected = [_ask(serving, seed)["choices"] for seed in (1, 2)]
        os.kill(victims["language-0"].pid, signal.SIGSTOP)  # what it is given now it cannot answer
        asked = [pool.submit(_ask, serving, seed) for seed in (1, 2)]
        eventually(lambda: any(future.done() for future in asked), "the other worker answers its share", HEALED_S)
        assert not all(future.done() for future in asked)

        folder.rename(away)
        os.kill(victims["language-0"].pid, signal.SIGKILL)
        answers = [future.result() for future in asked]
        assert [answer["choices"] for answer in answers] == expected
        assert sorted(answer["usage"]["hops"].get("attempts", 1) for answer in answers) == [1, 2]
        assert patient_cluster.workers["language-0"] == victims["language-0"], "it has not come back"
        assert serving.client.get("/ready").status_code == 200

        os.kill(victims["language-1"].pid, signal.SIGKILL)
        eventually(lambda: serving.client.get("/ready").status_code == 503, "it still says ready", HEALED_S)
        assert "no live language worker" in serving.client.get("/ready").text
        away.rename(folder)
        eventually(lambda: serving.client.get("/ready").status_code == 200, "no worker came back", HEALED_S)
        assert _ask(serving, 1)["choices"] == expected[0]
