"""Quantised matrices of public layouts, read back from what an independent restatement of those layouts wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.quantised_layouts import Quantised, Scheme, group_of_inputs, quantise, store, words
from transfer.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from transfer.checkpoint_quantised import QuantisedCheckpoint
from transfer.checkpoint_rules import Rule
from transfer.grouped_weights import GroupedWeight
from transfer.packed_layouts import AwqLayout, GptqLayout, PackedLayout
from transfer.quantisation_config import read_layout


def _layout(scheme: Scheme) -> PackedLayout:
    return read_layout(scheme.section())


def _draw(scheme: Scheme, out: int, inputs: int, seed: int) -> Quantised:
    weight = np.random.default_rng(seed).normal(0.05, 1.0, (out, inputs))
    return quantise(weight, scheme, group_of_inputs(inputs, scheme, seed))


def _assert_is(weight: GroupedWeight, expected: Quantised) -> None:
    assert np.array_equal(weight.numbers.numpy(), expected.numbers)
    assert np.array_equal(weight.groups.numpy(), expected.groups)
    assert torch.equal(weight.dequantised().double(), torch.from_numpy(expected.weight))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([-1, 16, 32, 64, 40]),
    sym=st.booleans(),
    desc_act=st.booleans(),
    low_zeros=st.booleans(),
    out=st.sampled_from([8, 24]),
    inputs=st.sampled_from([64, 96, 136]),
    seed=st.integers(0, 9),
)
def test_gptq(
    bits: int, group_size: int, sym: bool, desc_act: bool, low_zeros: bool, out: int, inputs: int, seed: int
) -> None:
    scheme = Scheme(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, low_zeros=low_zeros)
    expected = _draw(scheme, out, inputs, seed)
    _assert_is(_layout(scheme).read(store(expected, scheme)), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    group_size=st.sampled_from([-1, 16, 32, 64]),
    sym=st.booleans(),
    out=st.sampled_from([8, 24]),
    inputs=st.sampled_from([64, 128]),
    seed=st.integers(0, 9),
)
def test_awq(group_size: int, sym: bool, out: int, inputs: int, seed: int) -> None:
    scheme = Scheme(method="awq", group_size=group_size, sym=sym)
    expected = _draw(scheme, out, inputs, seed)
    _assert_is(_layout(scheme).read(store(expected, scheme)), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([-1, 32, 40]),
    sym=st.booleans(),
    desc_act=st.booleans(),
    inputs=st.sampled_from([64, 136]),
    seed=st.integers(0, 9),
)
def test_compressed_tensors(bits: int, group_size: int, sym: bool, desc_act: bool, inputs: int, seed: int) -> None:
    order = desc_act and group_size > 0
    scheme = Scheme(method="compressed-tensors", bits=bits, group_size=group_size, sym=sym, desc_act=order)
    expected = _draw(scheme, 16, inputs, seed)
    _assert_is(_layout(scheme).read(store(expected, scheme)), expected)


def test_one_word_of_each_layout_as_it_is_described() -> None:
    """Worked by hand: 0x76543210 holds 0..7 from its lowest bits up."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    scales = torch.ones(1, 8, dtype=torch.float16)
    awq = AwqLayout(group_size=0).read({"qweight": word, "qzeros": torch.zeros_like(word), "scales": scales})
    assert awq.dequantised().T.tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    gptq = GptqLayout(bits=4, group_size=0, has_low_zeros=True, is_symmetric=False, is_reordered=False)
    parts = {"qweight": word.expand(1, 8), "qzeros": torch.zeros_like(word), "scales": scales}
    assert gptq.read(parts).dequantised()[0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]  # the zero is one more than it says
    negative = torch.tensor([[-1]], dtype=torch.int32)  # eight times 15, the sign bit among them
    assert gptq.read({**parts, "qweight": negative.expand(1, 8)}).numbers.tolist() == [[15] * 8] * 8
    assert gptq.read({**parts, "qzeros": negative}).zeros.tolist() == [[0]] * 8  # one below 0 is 15


def test_symmetric_zeros_that_are_stored_as_they_are_mean_the_same() -> None:
    """Some writers name the first format and store 8: a symmetric matrix has no other zero."""
    scheme = Scheme(bits=4, sym=True)
    expected = _draw(scheme, 8, 64, 0)
    parts = store(expected, scheme)
    as_they_are = torch.from_numpy(words(expected.zeros.T, 4))
    assert not torch.equal(parts["qzeros"], as_they_are)
    _assert_is(_layout(scheme).read({**parts, "qzeros": as_they_are}), expected)


RULES = [
    Rule(pattern=r"a\.weight", target="both", rows=(0, 8)),
    Rule(pattern=r"b\.weight", target="both", rows=(8, 24)),
    Rule(pattern=r"norm", target="norm"),
]
Parts = dict[str, torch.Tensor]


def _write(folder: Path, scheme: Scheme, tensors: Parts, section: dict[str, Any] | None = None) -> Checkpoint:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    described = {**scheme.section(), **(section or {})}
    (folder / "config.json").write_text(json.dumps({"quantization_config": described}), encoding="utf-8")
    return QuantisedCheckpoint.of(Checkpoint.open(folder))


def _two(scheme: Scheme) -> tuple[Parts, torch.Tensor]:
    """Tensors of two matrices of 64 inputs and a norm; what the matrices stand for, one above the other."""
    drawn = {"a": _draw(scheme, 8, 64, 0), "b": _draw(scheme, 16, 64, 1)}
    tensors = {f"{name}.{kind}": part for name, q in drawn.items() for kind, part in store(q, scheme).items()}
    return {**tensors, "norm": torch.ones(3)}, torch.from_numpy(np.concatenate([q.weight for q in drawn.values()]))


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(),
        Scheme(bits=8, desc_act=True),
        Scheme(method="awq", sym=False),
        Scheme(method="compressed-tensors", sym=False, desc_act=True),
    ],
)
def test_matrices_are_loaded_as_one_tensor_each(scheme: Scheme, tmp_path: Path) -> None:
    tensors, expected = _two(scheme)
    checkpoint = _write(tmp_path / "one", scheme, tensors)
    assert list(checkpoint.tensors) == ["norm", "a.weight", "b.weight"]
    assert checkpoint.tensors["b.weight"].shape == (16, 64)
    both, norm = torch.zeros(24, 64, dtype=torch.float64), torch.zeros(3)
    report = load_checkpoint(checkpoint, {"both": both, "norm": norm}, RULES, fingerprint=True)
    assert (report.num_tensors, report.num_grouped) == (3, 2)
    assert torch.equal(both, expected) and torch.equal(norm, torch.ones(3))
    (scales,) = tensors.keys() & {"a.scales", "a.weight_scale"}
    tensors[scales] = tensors[scales] * 2
    other = _write(tmp_path / "two", scheme, tensors)
    again = load_checkpoint(other, {"both": both, "norm": norm}, RULES, fingerprint=True)
    assert again.fingerprint != report.fingerprint
    assert torch.equal(both[8:], expected[8:]) and torch.equal(both[:8], 2 * expected[:8])


def test_parts_may_lie_in_several_files(tmp_path: Path) -> None:
    tensors, expected = _two(Scheme())
    _write(tmp_path / "whole", Scheme(), tensors)
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    both = torch.zeros(24, 64, dtype=torch.float64)
    checkpoint = QuantisedCheckpoint.of(Checkpoint.open(folder))
    load_checkpoint(checkpoint, {"both": both, "norm": torch.zeros(3)}, RULES)
    assert torch.equal(both, expected)


def _without(name: str) -> Callable[[Parts], None]:
    def breaks(tensors: Parts) -> None:
        del tensors[name]

    return breaks


def _with(name: str, tensor: torch.Tensor) -> Callable[[Parts], None]:
    return lambda tensors: tensors.update({name: tensor})


GPTQ, REORDERED, AWQ = Scheme(), Scheme(desc_act=True), Scheme(method="awq", sym=False)
PACKED = Scheme(method="compressed-tensors", sym=False)
BROKEN: list[tuple[Scheme, Callable[[Parts], None], str]] = [
    (GPTQ, _without("a.qzeros"), r"missing: a\.qzeros \(of gptq\)"),
    (GPTQ, _without("b.qweight"), r"missing: b\.qweight \(of gptq\)"),
    (AWQ, _without("b.scales"), r"missing: b\.scales \(of awq\)"),
    (REORDERED, _without("a.g_idx"), r"missing: a\.g_idx \(of gptq\)"),
    (AWQ, _with("b.g_idx", torch.zeros(64, dtype=torch.int32)), r"unexpected: b\.g_idx \(awq has no such tensor\)"),
    (GPTQ, _with("c.g_idx", torch.zeros(64, dtype=torch.int32)), r"missing: c\.qweight \(of gptq\)"),
    (GPTQ, _with("a.weight", torch.zeros(8, 64)), r"ambiguous: a\.weight and a\.\w+, .* both hold a\.weight"),
    (GPTQ, _with("a.scales", torch.ones(3, 8).half()), r"a\.scales is \(3, 8\); gptq wants \(2, 8\) for 64 inputs"),
    (GPTQ, _with("a.scales", torch.ones(2, 8).int()), r"wrong dtype: a\.scales holds int32; gptq stores floats"),
    (GPTQ, _with("a.qweight", torch.ones(8, 8)), r"wrong dtype: a\.qweight holds float32; gptq stores int32"),
    (GPTQ, _with("a.qweight", torch.ones(8).int()), r"wrong shape: a\.qweight is \(8,\); gptq stores a matrix"),
    (GPTQ, _with("b.qzeros", torch.ones(2, 4).int()), r"wrong shape: b\.qzeros is \(2, 4\); gptq wants \(2, 2\)"),
    (GPTQ, _with("b.g_idx", torch.zeros(65).int()), r"wrong shape: b\.g_idx is \(65,\); gptq wants \(64,\)"),
    (PACKED, _without("a.weight_zero_point"), r"missing: a\.weight_zero_point \(of compressed-tensors\)"),
    (PACKED, _with("a.qzeros", torch.ones(1, 1).int()), r"unexpected: a\.qzeros \(compressed-tensors has no such"),
    (PACKED, _with("b.weight_scale", torch.ones(16, 1)), r"b\.weight_scale is \(16, 1\); compressed-tensors wants"),
    (AWQ, _with("a.qzeros", torch.ones(1, 1).int()), r"wrong shape: a\.qzeros is \(1, 1\); awq wants \(2, 1\)"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_parts_that_do_not_fit_are_named_before_anything_is_read(case: int, tmp_path: Path) -> None:
    scheme, breaks, message = BROKEN[case]
    tensors, _ = _two(scheme)
    breaks(tensors)
    with pytest.raises(CheckpointError, match=message):
        _write(tmp_path / "broken", scheme, tensors)


def test_words_must_hold_the_shape_that_is_stated(tmp_path: Path) -> None:
    tensors, _ = _two(PACKED)
    tensors["b.weight_shape"] = torch.tensor([16, 60])
    checkpoint = _write(tmp_path / "padded", PACKED, tensors)
    with pytest.raises(CheckpointError, match=r"b\.weight_shape says \[16, 60\]; the words hold \[16, 64\]"):
        load_checkpoint(checkpoint, {"both": torch.zeros(24, 64), "norm": torch.zeros(3)}, RULES)


@pytest.mark.parametrize("group", [-1, 2])
def test_groups_that_are_not_there_are_an_error(group: int, tmp_path: Path) -> None:
    tensors, _ = _two(REORDERED)
    tensors["b.g_idx"][5] = group
    checkpoint = _write(tmp_path / "broken", REORDERED, tensors)
    with pytest.raises(
        CheckpointError, match=rf"b\.g_idx names groups from {min(group, 0)} to {max(group, 1)}; there are 2"
    ):
        load_checkpoint(checkpoint, {"both": torch.zeros(24, 64), "norm": torch.zeros(3)}, RULES)


def _group(weights: dict[str, Any], **others: Any) -> dict[str, Any]:
    own = PACKED.section()["config_groups"]["group_0"]
    return {"config_groups": {"group_0": {**own, **others, "weights": {**own["weights"], **weights}}}}


UNREAD: list[tuple[Scheme, dict[str, Any], str]] = [
    (GPTQ, {"quant_method": "fp8"}, r"quantised by 'fp8', a layout that is not read; 'awq', 'gptq', 'compressed-"),
    (GPTQ, {"quant_method": "bitsandbytes"}, r"quantised by 'bitsandbytes'"),
    (GPTQ, {"quant_method": None}, r"quantised by None"),
    (GPTQ, {"quant_method": ["gptq"]}, r"quantised by \['gptq'\]"),
    (GPTQ, {"bits": 3}, r"bits = 3, and of gptq 4 and 8 are read"),
    (GPTQ, {"bits": "4"}, r"bits = '4'; a positive integer is needed"),
    (GPTQ, {"group_size": 0}, r"group_size = 0; a positive integer is needed, or -1"),
    (GPTQ, {"group_size": None}, r"group_size = None; a positive integer is needed, or -1"),
    (GPTQ, {"desc_act": "yes"}, r"desc_act = 'yes'; true or false is needed"),
    (GPTQ, {"checkpoint_format": "marlin"}, r"checkpoint_format = 'marlin', and of gptq 'gptq' and 'gptq_v2' are read"),
    (GPTQ, {"is_marlin_format": True}, r"checkpoint_format = 'marlin'"),
    (GPTQ, {"pack_dtype": "int16"}, r"pack_dtype = 'int16', and words of 'int32' are read"),
    (GPTQ, {"dynamic": {"-:a": {}, "+:b": {"bits": 8}}}, r"settings for \['\+:b'\] in dynamic"),
    (AWQ, {"bits": 8}, r"bits = 8, and of awq 4 are read"),
    (AWQ, {"version": "gemv"}, r"version = 'gemv', and of awq 'gemm' is read"),
    (PACKED, {"format": "float-quantized"}, r"format = 'float-quantized', and of compressed-tensors 'pack-quantized'"),
    (PACKED, {"config_groups": {}}, r"config_groups of another form, and groups with weights are read"),
    (PACKED, {"config_groups": {"a": {"weights": None}}}, r"config_groups of another form"),
    (PACKED, _group({"num_bits": 2}), r"num_bits = 2, and of compressed-tensors 4 and 8 are read"),
    (PACKED, _group({"num_bits": None}), r"num_bits = None, and of compressed-tensors 4 and 8 are read"),
    (PACKED, _group({"type": "float"}), r"type = 'float', and 'int' is read"),
    (PACKED, _group({"strategy": "tensor"}), r"strategy = 'tensor', and 'group' and 'channel' are read"),
    (PACKED, _group({"actorder": "other"}), r"actorder = 'other', and 'group' and 'weight' are read"),
    (PACKED, _group({"symmetric": 1}), r"in config_groups has symmetric = 1; true or false is needed"),
    (
        PACKED,
        _group({}, input_activations={"num_bits": 8}),
        r"activations in config_groups, and weights alone are read",
    ),
    (PACKED, {"config_groups": {**_group({})["config_groups"], "b": {"weights": {}}}}, r"several config_groups"),
]


@pytest.mark.parametrize("case", range(len(UNREAD)))
def test_layouts_that_are_not_read_are_refused_by_name(case: int, tmp_path: Path) -> None:
    scheme, section, message = UNREAD[case]
    with pytest.raises(CheckpointError, match=message):
        _write(tmp_path / "unread", scheme, _two(scheme)[0], section)


@pytest.mark.parametrize("section", [{"version": "GEMM"}, {"dynamic": {"-:lm_head": {}}}, {"format": "gptq"}])
def test_what_changes_nothing_may_be_said(section: dict[str, Any], tmp_path: Path) -> None:
    scheme = AWQ if "version" in section else GPTQ
    assert _write(tmp_path / "read", scheme, _two(scheme)[0], section).grouped


def test_a_plain_checkpoint_that_calls_itself_quantised_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: \*\.qweight: config\.json's quantization_config says gptq"):
        _write(tmp_path / "plain", GPTQ, {"a.weight": torch.zeros(8, 64)})
