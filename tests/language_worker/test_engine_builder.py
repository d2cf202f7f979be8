"""How "auto" is resolved: dtype, cache size, maximum length."""

import json
import re
from pathlib import Path

import pytest
import torch

from embedding_worker.config import EmbedConfig
from embedding_worker.errors import EmbedConfigError
from embedding_worker.runner import VisionRunner
from kernels.machine import GIB, memory_bytes, most_threads
from language_worker.config import EngineConfig
from language_worker.engine_builder import build_engine, check_model, resolve_cache, resolve_device, resolve_dtype
from language_worker.errors import InvalidRequest, ModelNotSupported
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


@pytest.mark.parametrize(
    ("values", "setting"),
    [
        ({"kv_cache_tokens": 10**12}, "kv_cache_tokens"),
        ({"kv_cache_bytes": 10**18, "max_num_seqs": 10**12, "max_step_tokens": 10**12}, "kv_cache_bytes"),
        ({"preemption": "swap", "swap_tokens": 10**13}, "swap_tokens"),
    ],
)
def test_more_memory_than_there_is_is_refused_before_it_is_asked_for(values: dict, setting: str) -> None:
    there = re.escape(f"has {memory_bytes(CPU) / GIB:,.1f} GiB of memory; lower {setting}")
    with pytest.raises(InvalidRequest, match=rf"tokens needs [\d,]+\.\d GiB, and this machine {there}"):
        _size(**values)


def test_what_fits_the_machine_is_not_refused() -> None:
    tokens = memory_bytes(CPU) // SPEC.kv.bytes_per_token(torch.float32) // 32 * 32
    assert _size(kv_cache_tokens=tokens, page_size=32).num_pages == tokens // 32
    with pytest.raises(InvalidRequest, match="lower kv_cache_tokens"):
        _size(kv_cache_tokens=tokens + 64, page_size=32)


def test_threads_beyond_all_reason_are_refused_by_both_halves(tmp_path: Path) -> None:
    folder, many = make_qwen2_5_vl(tmp_path), most_threads() + 1
    before = torch.get_num_threads()
    for refuse in (build_engine, check_model):
        with pytest.raises(InvalidRequest, match=rf"num_threads is {many}, .* use {most_threads()} at most"):
            refuse(folder, EngineConfig(device="cpu", num_threads=many))
    for load in (VisionRunner.load, VisionRunner.check):
        with pytest.raises(EmbedConfigError, match=rf"num_threads: {many} on .* use {most_threads()} at most"):
            load(folder, EmbedConfig(device="cpu", num_threads=many))
    assert torch.get_num_threads() == before
    assert check_model(folder, EngineConfig(device="cpu", num_threads=most_threads())) > 0


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
    for name in ("warp", "meta", "cuda:7", "cuda"):
        with pytest.raises(ModelNotSupported, match=name):
            resolve_device(name)
    with pytest.raises(ModelNotSupported, match="FooModel"):
        resolve_model({"architectures": ["FooModel"]})
    with pytest.raises(ModelNotSupported):
        resolve_model({})
