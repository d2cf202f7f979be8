"""MiniMind's own files behind the chat endpoint: the reference's tokens, with an adapter, streamed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cluster.config import build_config, flat_overrides
from cluster.gateway.app import create_app
from cluster.local import LocalWorkers
from tests.cluster.gateway.harness import MODEL, client_of, events_of, make_context, run
from tests.cluster.gateway.test_tools import TEMPLATE, TOOL
from tests.tiny_minimind import make_minimind, minimind_reference

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096}


def _reference_text(folder: Path, config: dict[str, Any], prompt: list[int], tokenizer: Any) -> str:
    """What the reference says, up to its end token or 12 tokens."""
    model = minimind_reference("3", config, 6)
    square = {name: t for name, t in model.state_dict().items() if t.dim() == 2 and t.shape[0] == t.shape[1]}
    sides = {}
    for i, (name, weight) in enumerate(square.items()):
        generator = torch.Generator().manual_seed(i)
        down, up = torch.randn(2, 64, generator=generator) / 8, torch.randn(64, 2, generator=generator)
        stem = name.removesuffix(".weight")
        sides |= {f"{stem}.lora.A.weight": down, f"{stem}.lora.B.weight": up}
        with torch.no_grad():
            weight.add_(up @ down)
    torch.save(sides, folder / "lora_test_64.pth")
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=config["eos_token_id"])
    return str(tokenizer.decode(out[0, len(prompt) :].tolist()))


def test_a_pth_with_an_adapter_answers_in_chat(tmp_path: Path) -> None:
    config = make_minimind(tmp_path, "3", "pth", seed=6)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    before = torch.get_num_threads()

    async def ask(handoff: Any, **fields: Any) -> tuple[str, list[int]]:
        app = create_app(make_context(tmp_path, handoff, image_token_id=None))
        async with client_of(app) as client:
            asked = {"model": MODEL, "max_tokens": 12, "temperature": 0, "tools": [TOOL], **fields}
            asked["messages"] = [{"role": "user", "content": "What is 1 and 2?"}]
            response = await client.post("/v1/chat/completions", json=asked)
            assert response.status_code == 200, response.text
            kwargs = {name: asked[name] for name in ("model", "messages")}
            ids = (await client.post("/tokenize", json=kwargs)).json()["tokens"]
            if fields.get("stream"):
                *chunks, _ = events_of(response.text)
                deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
                return "".join(delta.get("content") or "" for delta in deltas), ids
            return response.json()["choices"][0]["message"]["content"], ids

    def loaded(**overrides: Any) -> LocalWorkers:
        tree = flat_overrides({"model": {"path": str(tmp_path)}}, {**SETTINGS, **overrides})
        return LocalWorkers(build_config(tree).resolve())

    workers = loaded()
    plain, ids = run(ask(workers.handoff, tools=None))
    expected = _reference_text(tmp_path, config, ids, workers.info.tokenizer)
    workers.close()
    workers = loaded(lora=str(tmp_path / "lora_test_64.pth"))
    whole, _ = run(ask(workers.handoff, tools=None))
    streamed, _ = run(ask(workers.handoff, tools=None, stream=True))
    with_tools, _ = run(ask(workers.handoff))
    workers.close()
    torch.set_num_threads(before)
    assert whole == streamed == expected != plain
    assert with_tools != whole, "the model was told of the tools"
