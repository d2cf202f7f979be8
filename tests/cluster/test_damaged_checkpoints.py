"""Model folders whose JSON files are damaged, or hold a value of the wrong kind: each is refused with a typed error.

Every family's files are changed entry by entry; no change may end in anything but an error of this project, which the
command line tells in one line. Values that are read by nobody, or happen to make sense, are fine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.__main__ import main
from cluster.errors import ClusterError
from cluster.llm import LLM
from cluster.model_info import ModelInfo, has_vision
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import EmbedError
from embedding_worker.runner import VisionRunner
from language_worker.config import EngineConfig
from language_worker.engine_builder import check_model
from language_worker.errors import EngineError
from tests.profiles import IS_SOAK
from tests.quantised_layouts import Scheme, quantise_folder
from tests.tiny_llada import make_llada
from tests.tiny_llada_v import make_llada_v
from tests.tiny_minimind import make_minimind
from tests.tiny_minimind_v import make_minimind_v
from tests.tiny_models import make_qwen2_5_vl
from tests.tiny_nanochat import make_hf_nanochat, make_native_nanochat
from tests.tiny_qwen3_vl import make_qwen3_vl
from tests.tiny_text_models import ARCHITECTURES, make_text_model
from transfer.checkpoint import CheckpointError
from transfer.errors import TransferError

TYPED = (ClusterError, EmbedError, EngineError, TransferError)
CHANGES_A_DAY = 40  # of each family
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "truncate": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WRONG: tuple[Any, ...] = ("x", "", None, 0, -1, 1.5, 10**400, float("nan"), True, [], ["x"], [None], {}, {"x": 1})


def _quantised(plain: Path, scheme: Scheme) -> Path:
    return quantise_folder(plain, plain.parent, scheme)[0]


MAKERS: dict[str, Callable[[Path], object]] = {
    **{family: partial(make_text_model, family=family) for family in ARCHITECTURES},
    "llama-3": partial(make_text_model, family="llama", rope_parameters=LLAMA3),
    "qwen3-yarn": partial(make_text_model, family="qwen3", rope_scaling=YARN, max_position_embeddings=256),
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen2_5_vl-nested": partial(make_qwen2_5_vl, layout="nested"),
    "qwen3_vl": make_qwen3_vl,
    "llada": make_llada,
    "llada_v": lambda folder: make_llada_v(folder).folder,
    "minimind-moe": partial(make_minimind, variant="3-moe", layout="bin"),
    "minimind_v": partial(make_minimind_v, kind="siglip", layout="bin"),
    "minimind_v-naflex": partial(make_minimind_v, kind="naflex", layout="bin"),
    "llama-gptq": lambda folder: _quantised(make_text_model(folder, "llama"), Scheme(desc_act=True)),
    "qwen2-compressed": lambda folder: _quantised(
        make_text_model(folder, "qwen2"), Scheme(method="compressed-tensors")
    ),
    "qwen2_5_vl-awq": lambda folder: _quantised(make_qwen2_5_vl(folder), Scheme(method="awq", sym=False)),
    "nanochat": make_hf_nanochat,
    "nanochat-native": partial(make_native_nanochat, generation=4),
}


def _check(folder: Path) -> None:
    """All that is read of a folder before its weights, as `tandem doctor` and every start do. Raises what they do."""
    ModelInfo.load(folder)
    check_model(folder, EngineConfig())
    if has_vision(folder, {}):
        VisionRunner.check(folder, EmbedConfig())


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry of a JSON object, and of the entries of those."""
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict) and name != "added_tokens_decoder":
            yield from _places(value, (*path, name))


def _changed(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    return {**tree, first: _changed(tree[first], tuple(rest), value) if rest else value}


@pytest.mark.parametrize("family", MAKERS)
def test_no_entry_of_any_file_ends_in_a_traceback(family: str, tmp_path: Path) -> None:
    made = MAKERS[family](tmp_path / "made")
    folder = made if isinstance(made, Path) else tmp_path / "made"
    _check(folder)
    files = [path for path in sorted(folder.rglob("*.json")) if path.name != "tokenizer.json"]
    assert files
    changes = [(p, place, v) for p in files for place in _places(json.loads(p.read_text())) for v in WRONG]
    num_refused = 0
    chosen = changes if IS_SOAK else random.Random(7).sample(changes, min(CHANGES_A_DAY, len(changes)))
    for file, place, value in chosen:
        published = file.read_text(encoding="utf-8")
        file.write_text(json.dumps(_changed(json.loads(published), place, value)), encoding="utf-8")
        try:
            _check(folder)
        except TYPED as error:
            assert str(error)
            num_refused += 1
        except Exception as error:
            raise AssertionError(f"{file.name} with {place} = {value!r} ends in {error!r}") from error
        finally:
            file.write_text(published, encoding="utf-8")
    assert num_refused


def _bytes(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def _entry(name: str, **values: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps(content | values), encoding="utf-8")

    return damage


def _latin_in_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b'"version"', b'"v\xe9rsion"', 1))


def _integer_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {  # what is done -> what is said of it
    "config in latin-1": (_bytes("config.json", b'{\n"a": "\xe9"}'), ("config.json", "UTF-8", "byte 8, in line 2")),
    "config cut short": (_bytes("config.json", b'{"a":'), ("config.json", "not readable JSON", "line 1, column 6")),
    "config is a list": (_bytes("config.json", b"[1]"), ("config.json", "JSON object, not list")),
    "config nested too deep": (_bytes("config.json", b'{"a":' + b"[" * 100_000), ("config.json", "not readable JSON")),
    "tokenizer is no text": (_bytes("tokenizer.json", b"\xff\xfe\x00bad"), ("tokenizer.json", "UTF-8", "byte 0")),
    "tokenizer in latin-1": (_latin_in_tokenizer, ("tokenizer.json", "UTF-8", "0xe9")),
    "tokenizer settings in latin-1": (
        _bytes("tokenizer_config.json", b'{"chat_template": "\xe9"}'),
        ("tokenizer_config.json", "UTF-8"),
    ),
    "template in latin-1": (_bytes("chat_template.jinja", b"\xe9"), ("chat_template.jinja", "UTF-8")),
    "template is a number": (_entry("tokenizer_config.json", chat_template=5), ("chat_template = 5", "string")),
    "generation settings cut short": (_bytes("generation_config.json", b"{"), ("generation_config.json", "column 2")),
    "generation settings of a wrong kind": (
        _entry("generation_config.json", eos_token_id="x"),
        ("generation_config.json", "eos_token_id = 'x'", "token id"),
    ),
    "integers for weights": (_integer_norm, ("model.norm.weight", "int32", "floating point")),
}
VALUES: dict[str, Any] = {
    "architectures": "Qwen2ForCausalLM",
    "eos_token_id": "x",
    "max_position_embeddings": "x",
    "rms_norm_eps": None,
    "rope_parameters": 5,
    "rope_theta": "x",
    "tie_word_embeddings": "maybe",
    "num_key_value_heads": 0,
}
NOUGHT = {"rope_theta": 0, "max_position_embeddings": 0, "rms_norm_eps": -1}
for name, value in [*VALUES.items(), *NOUGHT.items()]:
    DAMAGE[f"{name}: {value}"] = (_entry("config.json", **{name: value}), (f"config.json has {name} = {value!r}",))
SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear"},
    {"type": "linear", "factor": 0},
    {"rope_type": "dynamic", "factor": None},
    {"rope_type": "yarn"},
    {"rope_type": "linear", "factor": "x"},
)
for scaling in SCALINGS:
    said = (f"{next(iter(scaling.values()))!r} has factor {scaling.get('factor')!r}", "at least 1")
    DAMAGE[f"rope_scaling: {scaling}"] = (_entry("config.json", rope_scaling=scaling), said)


@pytest.mark.parametrize("name", DAMAGE)
def test_the_command_line_tells_what_is_wrong_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = DAMAGE[name]
    make_text_model(tmp_path, "qwen2")
    damage(tmp_path)
    with pytest.raises(TYPED):
        _check(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "hello"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tandem: ") and all(word in line for word in words), line


def test_yarn_may_leave_its_factor_to_the_two_lengths(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    ids = [5, 6, 7, 8]
    answers = []
    for number, factor in enumerate(({}, {"factor": 4.0})):
        folder = make_text_model(
            tmp_path / str(number), "qwen2", rope_scaling={**scaling, **factor}, max_position_embeddings=256
        )
        with LLM(str(folder), dtype="float32", num_threads=1) as llm:
            answers.append(llm.logits(ids))
    assert torch.equal(*answers)


def test_what_is_wrong_in_an_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[]")
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    folder = make_text_model(tmp_path / "model", "qwen2")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json must hold a JSON object"):
        check_model(folder, EngineConfig(lora=str(tmp_path)))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model", "nowhere does not exist"),
        ("lora", "no such file or folder"),
        ("draft_model", "nowhere is no folder that exists"),
    ],
)
def test_a_path_that_is_not_there_is_told_as_such(setting: str, said: str, tmp_path: Path) -> None:
    settings = {"model": str(make_text_model(tmp_path / "model", "qwen2")), setting: str(tmp_path / "nowhere")}
    with pytest.raises(TYPED, match=said) as caught:
        LLM(**settings, num_threads=1)
    assert "config.json" not in str(caught.value) and "tokenizer" not in str(caught.value)
