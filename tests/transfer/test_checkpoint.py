"""Checkpoint reading: complete, or one error that names every finding."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from transfer.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from transfer.checkpoint_rules import Rule

WIDTH, INNER, LAYERS = 4, 6, 3
RULES = (
    Rule(pattern=r"(?:model\.)?body\.conv\.weight", target="conv", transform=lambda x: x.flatten(1)),
    Rule(pattern=r"(?:model\.)?body\.layers\.(\d+)\.(a|b)_proj\.weight", target=r"layers.\1.\2"),
    Rule(
        pattern=r"(?:model\.)?body\.layers\.(\d+)\.gate\.(weight|bias)", target=r"layers.\1.fused.\2", rows=(0, INNER)
    ),
    Rule(
        pattern=r"(?:model\.)?body\.layers\.(\d+)\.up\.(weight|bias)",
        target=r"layers.\1.fused.\2",
        rows=(INNER, 2 * INNER),
    ),
    Rule(pattern=r"(?:model\.)?body\.layers\.(\d+)\.(pre|post)_norm\.weight", target=r"layers.\1.\2"),
    Rule(pattern=r"(?:model\.)?body\.norm\.weight", target="norm"),
)
FOREIGN = (r"head\.weight", r"(?:model\.)?text\..*")


def _source(prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"body.conv.weight": draw(WIDTH, 3, 2, 2), "body.norm.weight": draw(WIDTH)}
    for i in range(LAYERS):
        tensors |= {f"body.layers.{i}.{name}_proj.weight": draw(WIDTH, WIDTH) for name in "ab"}
        tensors |= {f"body.layers.{i}.{name}_norm.weight": draw(WIDTH) for name in ("pre", "post")}
        for name in ("gate", "up"):
            tensors |= {
                f"body.layers.{i}.{name}.weight": draw(INNER, WIDTH),
                f"body.layers.{i}.{name}.bias": draw(INNER),
            }
    tensors["text.layers.0.weight"] = draw(2, 2)
    return {prefix + name: tensor for name, tensor in tensors.items()} | {"head.weight": draw(3, 3)}


def _destinations(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"conv": (WIDTH, 12), "norm": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.a": (WIDTH, WIDTH), f"layers.{i}.b": (WIDTH, WIDTH)}
        shapes |= {f"layers.{i}.pre": (WIDTH,), f"layers.{i}.post": (WIDTH,)}
        shapes |= {f"layers.{i}.fused.weight": (2 * INNER, WIDTH), f"layers.{i}.fused.bias": (2 * INNER,)}
    return {name: torch.full(shape, float("nan"), dtype=dtype) for name, shape in shapes.items()}


def _own_names(source: dict[str, torch.Tensor]) -> list[str]:
    return sorted(name for name in source if "body." in name)


def _save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, seed: int = 0) -> dict[str, str]:
    """Write as one file or as shards in a random split; returns the index."""
    for old in folder.glob("*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return {}
    rng = random.Random(seed)
    weight_map = {
        name: f"model-{rng.randrange(shards)}.safetensors" for name in rng.sample(sorted(tensors), len(tensors))
    }
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, where in weight_map.items() if where == file}, folder / file)
    _write_index(folder, weight_map)
    return weight_map


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _problems(folder: Path) -> tuple[str, ...]:
    destinations = _destinations()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Checkpoint.open(folder), destinations, RULES, foreign=FOREIGN)
    assert all(tensor.isnan().all() for tensor in destinations.values()), "nothing may be written before all is checked"
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def _assert_loaded(source: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor], prefix: str) -> None:
    expected = {
        "conv": source[prefix + "body.conv.weight"].reshape(WIDTH, 12),
        "norm": source[prefix + "body.norm.weight"],
    }
    for i in range(LAYERS):
        layer = f"{prefix}body.layers.{i}."
        expected |= {f"layers.{i}.{name}": source[f"{layer}{name}_proj.weight"] for name in "ab"}
        expected |= {f"layers.{i}.{name}": source[f"{layer}{name}_norm.weight"] for name in ("pre", "post")}
        for kind in ("weight", "bias"):
            expected[f"layers.{i}.fused.{kind}"] = torch.cat([source[f"{layer}{n}.{kind}"] for n in ("gate", "up")])
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.integers(1, 5),
    seed=st.integers(0, 999),
    prefix=st.sampled_from(["", "model."]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_split_into_shards_loads_completely(
    tmp_path: Path, shards: int, seed: int, prefix: str, dtype: torch.dtype
) -> None:
    source = _source(prefix)
    _save(tmp_path, source, shards, seed)
    destinations = _destinations(dtype)
    report = load_checkpoint(Checkpoint.open(tmp_path), destinations, RULES, foreign=FOREIGN, fingerprint=True)
    _assert_loaded(source, destinations, prefix)
    assert (report.num_tensors, report.num_foreign) == (len(source) - 2, 2)
    assert report.num_bytes == sum(source[name].numel() * 4 for name in _own_names(source))


def test_fingerprint_names_the_bytes_and_not_the_files(tmp_path: Path) -> None:
    source = _source()
    prints = []
    for shards, change in ((1, 0.0), (3, 0.0), (3, 1e-6)):
        source["body.norm.weight"] = source["body.norm.weight"] + change
        _save(tmp_path, source, shards)
        report = load_checkpoint(Checkpoint.open(tmp_path), _destinations(), RULES, foreign=FOREIGN, fingerprint=True)
        prints.append(report.fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", _own_names(_source()))
def test_every_missing_tensor_is_named(tmp_path: Path, name: str, prefix: str) -> None:
    source = _source(prefix)
    del source[prefix + name]
    _save(tmp_path, source)
    assert _problems(tmp_path) == (f"missing: {prefix}{name}",)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_all_findings_come_in_one_error(tmp_path: Path, data: st.DataObject) -> None:
    source = _source()
    names = data.draw(st.lists(st.sampled_from(_own_names(source)), min_size=1, max_size=6, unique=True))
    expected = set()
    for name in names:
        tensor = source.pop(name)
        change = data.draw(st.sampled_from(["delete", "rename", "reshape"]))
        if change == "rename":
            source[name + ".old"] = tensor
            expected.add(f"unexpected: {name}.old")
        if change == "reshape":
            source[name] = torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:])
            expected.add(f"wrong shape: {name} is ({tensor.shape[0] + 1},")
        else:
            expected.add(f"missing: {name}")
    _save(tmp_path, source, shards=data.draw(st.integers(1, 3)))
    problems = _problems(tmp_path)
    assert len(problems) == len(expected)
    for start in expected:
        assert sum(problem.startswith(start) for problem in problems) == 1, (start, problems)


def test_a_layer_too_many_and_a_name_held_twice_are_named(tmp_path: Path) -> None:
    source = _source()
    source["body.layers.7.a_proj.weight"] = torch.zeros(WIDTH, WIDTH)
    source["model.body.norm.weight"] = torch.zeros(WIDTH)
    _save(tmp_path, source)
    first, second = _problems(tmp_path)
    assert "unexpected: body.layers.7.a_proj.weight" in first
    assert second == "ambiguous: body.norm.weight and model.body.norm.weight both hold norm"


def test_a_transform_that_cannot_take_the_shape_is_a_wrong_shape(tmp_path: Path) -> None:
    source = _source() | {"body.conv.weight": torch.zeros(WIDTH, 3, 2, 3)}
    _save(tmp_path, source)
    (problem,) = _problems(tmp_path)
    assert problem.startswith("wrong shape: body.conv.weight is (4, 3, 2, 3), (4, 18) as loaded")


def test_rows_that_no_rule_fills_are_named(tmp_path: Path) -> None:
    _save(tmp_path, _source())
    with pytest.raises(CheckpointError, match="rows 0 to 2 of extra, for which there is nothing"):
        load_checkpoint(Checkpoint.open(tmp_path), _destinations() | {"extra": torch.zeros(2)}, RULES, foreign=FOREIGN)


def test_two_rules_for_one_name_are_a_bug(tmp_path: Path) -> None:
    _save(tmp_path, _source())
    rules = [*RULES, Rule(pattern=r"body\.norm\..*", target="norm")]
    with pytest.raises(ValueError, match="claimed by 2 rules"):
        load_checkpoint(Checkpoint.open(tmp_path), _destinations(), rules, foreign=FOREIGN)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    index = _save(tmp_path, _source(), shards=3)
    moved, unknown, *_ = sorted(index)
    elsewhere = next(file for file in sorted(set(index.values())) if file != index[moved])
    _write_index(
        tmp_path,
        {name: file for name, file in index.items() if name != unknown} | {moved: elsewhere, "ghost": elsewhere},
    )
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    listed = str(caught.value)
    assert f"{moved} is in {index[moved]}, the index says {elsewhere}" in listed
    assert f"{unknown} is in {index[unknown]}, the index does not know it" in listed
    assert f"ghost should be in {elsewhere} by the index, and is not" in listed


def test_missing_and_damaged_shards_are_named(tmp_path: Path) -> None:
    index = _save(tmp_path, _source(), shards=3)
    gone, cut, *_ = sorted(set(index.values()))
    (tmp_path / gone).unlink()
    data = (tmp_path / cut).read_bytes()
    (tmp_path / cut).write_bytes(data[:-3])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert f"{gone} is missing" in str(caught.value)
    assert f"{cut} is damaged or cut short" in str(caught.value)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, length: int) -> None:
    _save(tmp_path, _source())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "not a file name"),
        ('{"weight_map": {"a": 3}}', "not a file name"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_folders_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors are preferred"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    _save(tmp_path, _source())
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(tmp_path).config()


def test_headers_tell_names_dtypes_and_shapes_and_stream_yields_the_tensors(tmp_path: Path) -> None:
    source = _source() | {"head.weight": torch.zeros(3, 5, dtype=torch.bfloat16), "count": torch.tensor(7)}
    _save(tmp_path, source, shards=3)
    checkpoint = Checkpoint.open(tmp_path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in source.items()
    }
    streamed = dict(checkpoint.stream(sorted(source)))
    assert streamed.keys() == source.keys()
    assert all(torch.equal(streamed[name], source[name]) for name in source)
    file = checkpoint.tensors["count"].file
    assert torch.equal(load_file(file)["count"], source["count"])


def test_the_error_survives_pickling() -> None:
    error = CheckpointError("/models/x", ("missing: a", "missing: b"))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is CheckpointError
    assert (copy.folder, copy.problems, str(copy)) == (error.folder, error.problems, str(error))
