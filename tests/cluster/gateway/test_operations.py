"""Models, health, readiness, metrics, version, tokenizer routes, API keys and request ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.gateway.harness import REPLY, assert_error, gateway, run

KEYED = ["/v1/models", "/v1/models/tiny", "/v1/nothing", "/tokenize", "/detokenize"]
OPEN = ["/health", "/ready", "/version", "/metrics"]


def test_models(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path, model_name="org/tiny") as server:
            listed = (await server.client.get("/v1/models")).json()
            assert listed["object"] == "list"
            (model,) = listed["data"]
            assert (model["id"], model["object"], model["max_model_len"]) == ("org/tiny", "model", 4096)
            assert (await server.client.get("/v1/models/org/tiny")).json() == model
            assert_error(await server.client.get("/v1/models/other"), 404, "model_not_found")

    run(main())


def test_health_ready_version(tmp_path: Path) -> None:
    async def main() -> None:
        state = (False, "1 of 2 workers is starting")
        async with gateway(tmp_path, ready=lambda: state) as server:
            assert (await server.client.get("/health")).status_code == 200
            response = await server.client.get("/ready")
            assert "1 of 2 workers is starting" in assert_error(response, 503, "not_ready")["message"]
            assert response.headers["retry-after"] == "1"
            state = (True, "")
            assert (await server.client.get("/ready")).status_code == 200
            assert (await server.client.get("/version")).json()["version"]

    run(main())


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic key-one", "key-one", "Bearer key-on", "Bearer key-oné"]
)
def test_without_a_right_key_the_api_is_closed(tmp_path: Path, header: str | None) -> None:
    async def main() -> None:
        async with gateway(tmp_path, api_keys=("key-one", "key-two")) as server:
            headers = {} if header is None else {"authorization": header.encode()}
            for path in KEYED:
                response = await server.client.get(path, headers=headers)
                assert_error(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
            assert_error(await server.chat(), 401, "invalid_api_key")
            for path in OPEN:
                assert (await server.client.get(path, headers=headers)).status_code == 200
            for key in ("key-one", "key-two"):
                right = {"authorization": f"Bearer {key}"}
                assert (await server.client.get("/v1/models", headers=right)).status_code == 200

    run(main())


def test_request_ids(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            get = server.client.get
            assert (await get("/health", headers={"x-request-id": "mine-1"})).headers["x-request-id"] == "mine-1"
            made = [(await get("/nothing")).headers["x-request-id"] for _ in range(2)]
            assert len(set(made)) == 2
            odd = (await get("/health", headers={"x-request-id": "a b\t<script>"})).headers["x-request-id"]
            assert odd.startswith("req-")

    run(main())


def test_tokenize_and_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            post = server.client.post
            body = (await post("/tokenize", json={"model": "tiny", "prompt": "What number? é"})).json()
            assert body["count"] == len(body["tokens"])
            assert body["max_model_len"] == 4096
            back = await post("/detokenize", json={"tokens": body["tokens"]})
            assert back.json() == {"prompt": "What number? é"}
            messages = [{"role": "user", "content": "hi"}]
            chat = (await post("/tokenize", json={"messages": messages})).json()
            await server.chat(messages=messages)
            assert tuple(chat["tokens"]) == server.handoff.submitted[0].request.prompt_token_ids
            assert_error(await post("/detokenize", json={"tokens": [10**9]}), 400, "invalid_request")
            assert_error(await post("/tokenize", json={}), 400, "invalid_request")
            assert_error(await post("/tokenize", json={"model": "x", "prompt": ""}), 404, "model_not_found")

    run(main())


def test_metrics_page(tmp_path: Path) -> None:
    async def workers() -> Mapping[str, Mapping[str, Any] | None]:
        return {
            "language-0": {"num_requests_running": 1, "kv_pages_referenced": 5, "prompt_tokens_total": 9, "name": "x"},
            "embedding-0": None,
        }

    async def main() -> None:
        async with gateway(tmp_path, worker_stats=workers) as server:
            await server.chat()
            await server.chat(stream=True)
            await server.chat(temperature=-1)
            server.app.state.gateway.metrics.count_attempt("PeerLost")
            page = (await server.client.get("/metrics")).text
            samples = {
                (s.name, tuple(sorted(s.labels.items()))): s.value
                for family in text_string_to_metric_families(page)
                for s in family.samples
            }

            def value(name: str, **labels: str) -> float:
                return samples[f"tandem:{name}", tuple(sorted(labels.items()))]

            assert value("request_success_total", finish_reason="stop") == 2
            assert value("generation_tokens_total") == 2 * len(REPLY)
            assert value("prompt_tokens_total") == sum(
                len(r.request.prompt_token_ids) for r in server.handoff.submitted
            )
            assert value("time_to_first_token_seconds_count") == 2
            assert value("inter_token_latency_seconds_count") == 2 * (len(REPLY) - 1)
            assert value("e2e_request_latency_seconds_count") == 2
            assert value("http_requests_total", endpoint="/v1/chat/completions", status="200") == 2
            assert value("http_requests_total", endpoint="/v1/chat/completions", status="400") == 1
            assert value("request_errors_total", code="invalid_request") == 1
            assert value("gateway_requests_active") == 0
            assert value("request_attempts_total", reason="PeerLost") == 1
            assert value("request_attempts_total", reason="EngineFailed") == 0
            assert value("num_requests_running", worker="language-0") == 1
            assert value("kv_pages_referenced", worker="language-0") == 5
            assert value("worker_prompt_tokens_total", worker="language-0") == 9
            assert value("worker_up", worker="language-0") == 1
            assert value("worker_up", worker="embedding-0") == 0

    run(main())
