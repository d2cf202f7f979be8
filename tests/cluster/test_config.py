"""The configuration: strict from YAML to the resolved object, every error a ConfigError that names the key."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, GatewayConfig, build_config, flat_overrides, load_config
from cluster.demo import MODEL_DIR
from cluster.errors import ConfigError
from cluster.yaml_files import read_yaml
from embedding_worker.config import EmbedConfig
from language_worker.config import EngineConfig
from transfer.config import TransferConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as far as the configuration looks at it."""
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def _yaml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tandem.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_a_merge_brings_may_be_set_again(tmp_path: Path) -> None:
    text = "embedding: &half {num_threads: 2, device: cpu}\nlanguage: {<<: *half, num_threads: 3}\n"
    config = load_config(_yaml(tmp_path, text))
    assert (config.embedding.num_threads, config.language.num_threads, config.language.device) == (2, 3, "cpu")


def test_defaults_are_those_of_the_components() -> None:
    config = load_config()
    assert config == ClusterConfig() == build_config({})
    assert (config.embedding, config.language, config.transfer) == (EmbedConfig(), EngineConfig(), TransferConfig())


def test_every_key_of_every_section_can_be_set_to_its_own_default() -> None:
    """What the dataclasses hold is what YAML can say, lists for tuples; so no field has a type the check refuses."""
    tree = dataclasses.asdict(ClusterConfig())
    assert set(tree) == {"model", "embedding", "language", "transfer", "gateway", "workers"}
    tree["gateway"]["api_keys"] = list(tree["gateway"]["api_keys"])
    assert build_config(tree) == ClusterConfig()


def test_yaml_with_overrides(tmp_path: Path) -> None:
    path = _yaml(
        tmp_path,
        "model: {path: /m}\ntransfer: {block_size: 16}\n"
        "gateway:\n  api_keys: [a, b]\n  request_timeout_s: 5\nworkers:\n",
    )
    config = load_config(path, {"transfer.block_size": 64, "gateway.port": 0, "workers.language": 2})
    assert (config.model.path, config.transfer.block_size, config.gateway.port) == ("/m", 64, 0)
    assert (config.gateway.api_keys, config.gateway.request_timeout_s) == (("a", "b"), 5.0)
    assert (config.workers.embedding, config.workers.language) == (1, 2)
    assert load_config(path).transfer.block_size == 16


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\ntransfer:\n", "{}"])
def test_empty_means_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(_yaml(tmp_path, text)) == ClusterConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "unknown setting modle; known here: .*model"),
        ("transfer: {blocksize: 1}", "unknown setting transfer.blocksize; known here: .*block_size"),
        ("transfer: {1: 2}", "unknown setting transfer.1"),
        ("transfer: [1]", r"transfer must be a map of settings, not \[1\]"),
        ("transfer: {block_size: '16'}", "transfer.block_size: .*integer.*got '16'"),
        ("transfer: {block_size: 16.0}", "transfer.block_size: .*integer"),
        ("transfer: {block_size: true}", "transfer.block_size: .*integer"),
        ("transfer: {block_size: 0}", "transfer: transfer.block_size must be positive"),
        ("transfer: {stream_timeout_s: .nan}", "stream_timeout_s must be positive and finite"),
        ("embedding: {min_pixels: 9, max_pixels: 4}", "embedding: .*exceeds max_pixels"),
        ("language: {max_step_tokens: 8}", "language: max_step_tokens .* is smaller than max_num_seqs"),
        ("language: {dtype: float8}", "language.dtype: .*'float32'"),
        ("model: {dtype: int8}", "model.dtype: .*'float32'"),
        ("model: {max_model_len: -1}", "model.max_model_len is -1"),
        ("gateway: {port: 65536}", "gateway.port is 65536"),
        ("gateway: {api_keys: secret}", "gateway.api_keys: .*tuple"),
        ("gateway: {api_keys: ['']}", "gateway.api_keys holds an empty key"),
        ("gateway: {api_keys: [1]}", "gateway.api_keys: .*string"),
        ("gateway: {max_body_bytes: 0}", "gateway.max_body_bytes is 0"),
        ("gateway: {request_timeout_s: .nan}", "gateway.request_timeout_s"),
        ("gateway: {request_timeout_s: .inf}", "gateway.request_timeout_s"),
        ("gateway: {drain_s: 1.0e+300}", r"gateway.drain_s is 1e\+300; use a positive number of seconds, 1e\+09 at"),
        ("gateway: {request_timeout_s: 1.0e+16}", "gateway.request_timeout_s"),
        ("transfer: {tick_s: 3.0e+6}", "transfer.tick_s is 3000000.0 seconds; use at most 1e.06"),
        ("workers: {health_timeout_s: 1.0e+16}", "workers.health_timeout_s is"),
        ("workers: {language: 0}", "workers.language is 0"),
        ("workers: {num_gpus: -2}", "workers.num_gpus"),
        ("workers: {start_timeout_s: .inf}", "workers.start_timeout_s is inf"),
        ("workers: {health_timeout_s: 0}", "workers.health_timeout_s is 0"),
        ("- model", "must hold a map of settings, not list"),
        ("model: {path: 'x", "is not valid YAML"),
        ("model: {path: x, path: y}", "path stands there twice"),
        ("model: {path: x}\nmodel: {dtype: auto}", "model stands there twice"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = _yaml(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: \xff}")
    with pytest.raises(ConfigError, match=r"latin\.yaml is not valid YAML"):
        load_config(tmp_path / "latin.yaml")


def test_a_bad_override_is_named_without_the_file(tmp_path: Path) -> None:
    path = _yaml(tmp_path, "transfer: {block_size: 16}")
    with pytest.raises(ConfigError, match=r"^unknown setting transfer\.blocks;"):
        load_config(path, {"transfer.blocks": 1})
    with pytest.raises(ConfigError, match=r"^unknown setting transfers"):
        load_config(path, {"transfers.block_size": 1})


def test_flat_names_go_to_the_model_or_to_every_component_that_has_them() -> None:
    tree = flat_overrides(
        {"model": {"path": "/m"}},
        {"dtype": "float32", "num_threads": 2, "block_size": 16, "cache_tokens": 0, "page_size": 8},
    )
    assert tree == {
        "model": {"path": "/m", "dtype": "float32"},
        "embedding": {"num_threads": 2, "cache_tokens": 0},
        "language": {"num_threads": 2, "page_size": 8},
        "transfer": {"block_size": 16},
    }


def test_a_section_by_its_name_is_merged_in_the_order_given() -> None:
    tree = flat_overrides({}, {"num_threads": 2, "language": {"num_threads": 1, "page_size": 8}})
    assert tree == {"embedding": {"num_threads": 2}, "language": {"num_threads": 1, "page_size": 8}}
    tree = flat_overrides({}, {"language": {"num_threads": 1}, "num_threads": 2})
    assert tree["language"] == {"num_threads": 2}


def test_unknown_flat_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting blok_size; known here: .*block_size"):
        flat_overrides({}, {"blok_size": 16})
    with pytest.raises(ConfigError, match="language must be a map of settings, not"):
        flat_overrides({}, {"language": 3})


def test_resolve_hands_the_model_s_settings_to_the_workers(folder: Path) -> None:
    tree: dict[str, Any] = {
        "model": {"path": str(folder), "dtype": "bfloat16", "device": "cpu", "max_model_len": 77},
        "gateway": {"max_image_bytes": 1000, "max_images_per_request": 400},
    }
    plain = build_config(tree)
    config = plain.resolve()
    assert (config.embedding.dtype, config.embedding.device) == ("bfloat16", "cpu")
    assert (config.language.dtype, config.language.device, config.language.max_model_len) == ("bfloat16", "cpu", 77)
    assert (config.embedding.max_image_bytes, config.embedding.max_images_per_request) == (1000, 400)
    assert config.model.served_model_name == "tiny"
    assert plain.embedding == EmbedConfig(), "the config itself is untouched"
    assert config.resolve() == config, "resolving again changes nothing"


def test_what_a_worker_says_itself_wins(folder: Path) -> None:
    tree = {
        "model": {"path": str(folder), "dtype": "bfloat16", "device": "cuda", "max_model_len": 77},
        "embedding": {"dtype": "float32", "device": "cpu"},
        "language": {"dtype": "float32", "max_model_len": 5},
    }
    config = build_config(tree).resolve()
    assert (config.embedding.dtype, config.embedding.device) == ("float32", "cpu")
    assert (config.language.dtype, config.language.device, config.language.max_model_len) == ("float32", "cuda", 5)


def test_halves_of_different_dtypes_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"embedding\.dtype is float16 and language\.dtype is float32"):
        build_config({"model": {"path": str(folder), "dtype": "float16"}, "language": {"dtype": "float32"}}).resolve()


def test_a_model_folder_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no model is named"):
        ClusterConfig().resolve()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        build_config({"model": {"path": str(folder.parent)}}).resolve()
    with pytest.raises(ConfigError, match="nowhere does not exist; point --model"):
        build_config({"model": {"path": str(folder / "nowhere")}}).resolve()
    with pytest.raises(ConfigError, match=r"config\.json is a file; point --model"):
        build_config({"model": {"path": str(folder / "config.json")}}).resolve()
    monkeypatch.chdir(folder.parent)
    assert build_config({"model": {"path": "tiny"}}).resolve().model.path == str(folder.resolve())


def test_the_dataclasses_guard_themselves() -> None:
    for values in (
        {"port": -1},
        {"host": ""},
        {"api_keys": ("",)},
        {"request_timeout_s": math.nan},
        {"max_concurrent_requests": 0},
    ):
        with pytest.raises(ConfigError):
            GatewayConfig(**values)


@pytest.mark.parametrize("key", ["k" * 15, "short", "0"])
@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.2", "::", "worker-7", "127.1"])
def test_a_short_key_is_refused_where_others_can_connect(host: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{len(key)} characters.*use 16 or more"):
        GatewayConfig(host=host, api_keys=("k" * 16, key))
    assert GatewayConfig(host=host, api_keys=("k" * 16,)).host == host
    for here in ("127.0.0.1", "::1", "localhost"):
        assert GatewayConfig(host=here, api_keys=(key,)).api_keys == (key,)


@pytest.mark.parametrize("key", [" ", "two words", " padded", "tab\t", "line\n", "\x00"])
def test_a_key_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="no client can send it"):
        GatewayConfig(api_keys=(key,))


def test_prefill_and_decode_workers_take_the_place_of_language_workers() -> None:
    together, split = (build_config({"workers": tree}) for tree in ({"language": 2}, {"prefill": 2, "decode": 3}))
    assert together.workers.counts == {"embedding": 1, "language": 2} and not together.workers.is_split
    assert split.workers.counts == {"embedding": 1, "prefill": 2, "decode": 3} and split.workers.is_split


@pytest.mark.parametrize(
    "workers", [{"prefill": 1}, {"decode": 1}, {"prefill": -1, "decode": 1}, {"prefill": 1, "decode": 1, "language": 2}]
)
def test_half_a_split_is_refused(workers: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="workers"):
        build_config({"workers": workers})


def test_a_draft_model_is_refused_where_its_kv_would_have_to_travel() -> None:
    tree = {"model": {"path": str(MODEL_DIR)}, "workers": {"prefill": 1, "decode": 1}}
    build_config(tree).resolve()
    with pytest.raises(ConfigError, match="draft_model"):
        build_config({**tree, "language": {"draft_model": str(MODEL_DIR)}}).resolve()


def test_placement_by_roles_is_one_of_two_words() -> None:
    assert build_config({"workers": {"placement": "roles"}}).workers.placement == "roles"
    with pytest.raises(ConfigError, match=r"workers\.placement"):
        build_config({"workers": {"placement": "role"}})


def test_keys_that_a_merge_brings_may_be_written_beside_it(tmp_path: Path) -> None:
    """Also where the map that is merged has a merge of its own; and a number is another key than its digits."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "base: &base {x: 1}\na: {inner: &mid {<<: *base, x: 2}}\nb: {<<: *mid, y: 3}\nc: {1: one, '1': digit}\n"
    )
    read = read_yaml(path)
    assert read["a"]["inner"] == {"x": 2} and read["b"] == {"x": 2, "y": 3} and len(read["c"]) == 2
