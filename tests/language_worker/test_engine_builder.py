"""How "auto" is resolved: dtype, cache size, maximum length."""

import json
from pathlib import Path

import pytest
import torch

from language_worker.config import EngineConfig
from language_worker.engine_builder import resolve_cache, resolve_device, resolve_dtype
from language_worker.errors import ModelNotSupported
from language_worker.models import resolve_model
from language_worker.models.base import KVSpec, ModelSpec
from tests.tiny_models import make_qwen2_5_vl
from transfer.checkpoint import Checkpoint

SPEC = ModelSpec(
    vocab_size=10,
    hidden_size=8,
    max_position_embeddings=1000,
    kv=KVSpec(num_layers=2, num_kv_heads=2, head_dim=8),
    media_token_id=None,
)
CPU = torch.device("cpu")


def _size(**values):
    return resolve_cache(EngineConfig(**values), SPEC, torch.float32, CPU)


def test_cache_holds_what_was_asked_for_rounded_up_to_pages() -> None:
    size = _size(kv_cache_tokens=100)
    assert (size.num_pages, size.max_model_len) == (4, 128)


def test_cache_from_bytes_is_rounded_down() -> None:
    per_token = 2 * 2 * 2 * 8 * 4
    assert _size(kv_cache_bytes=per_token * 95).num_pages == 2


def test_cache_is_at_most_what_all_seats_could_use() -> None:
    size = _size(max_num_seqs=2)
    assert size.num_pages == 2 * (1000 + 32) // 32 and size.max_model_len == 1000


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_model_len": 1001}, "1000 positions"),
        ({"max_model_len": 500, "kv_cache_tokens": 96}, "96 tokens"),
        ({"kv_cache_bytes": 10}, "kv_cache_bytes"),
    ],
)
def test_impossible_sizes_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ModelNotSupported, match=words):
        _size(**values)


@pytest.mark.parametrize(("stored", "wanted"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_auto_dtype_is_the_checkpoints(stored: str, wanted: torch.dtype, tmp_path: Path) -> None:
    folder = make_qwen2_5_vl(tmp_path, torch_dtype=stored)
    assert resolve_dtype("auto", Checkpoint.open(folder)) is wanted
    assert resolve_dtype("float16", Checkpoint.open(folder)) is torch.float16
    config = json.loads((folder / "config.json").read_text())
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_dtype("auto", Checkpoint.open(folder)) is wanted


def test_unknown_devices_and_architectures_are_refused() -> None:
    with pytest.raises(ModelNotSupported, match="warp"):
        resolve_device("warp")
    with pytest.raises(ModelNotSupported, match="FooModel"):
        resolve_model({"architectures": ["FooModel"]})
    with pytest.raises(ModelNotSupported):
        resolve_model({})
