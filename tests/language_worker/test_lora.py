"""Low-rank adapters: the same answers as a checkpoint changed beforehand; strict about every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from language_worker.lora import Adapter
from tests.language_worker.helpers import GREEDY, drive, make_engine, prompt, request
from tests.tiny_minimind import make_minimind
from tests.tiny_text_models import make_text_model
from transfer.checkpoint import CheckpointError

RANK = 4
IDS = prompt(30, seed=1, vocab=300)


def _matrices(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: (
            torch.randn(RANK, shape[1], generator=generator) / 8,
            torch.randn(shape[0], RANK, generator=generator) / 4,
        )
        for name, shape in shapes.items()
    }


def _native(folder: Path) -> tuple[Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A MiniMind with an adapter of its square weights beside it."""
    make_minimind(folder, "3", "pth", seed=2)
    tensors = torch.load(folder / "full_sft_64.pth", weights_only=True)
    square = {name: tuple(t.shape) for name, t in tensors.items() if t.dim() == 2 and t.shape[0] == t.shape[1]}
    matrices = _matrices(square)
    assert len(matrices) == 4, "q and o of two layers"
    sides = {
        f"{name.removesuffix('.weight')}.lora.{side}.weight": pair[i]
        for name, pair in matrices.items()
        for i, side in enumerate("AB")
    }
    torch.save(sides, folder / "lora_medical_64.pth")
    return folder, matrices


def _tokens(folder: Path, **config: Any) -> list[int]:
    result = drive(make_engine(folder, **config), [request("a", IDS, GREEDY)])["a"]
    assert result.error is None
    return result.tokens()


def test_a_native_adapter_equals_changed_weights(tmp_path: Path) -> None:
    folder, matrices = _native(tmp_path / "base")
    changed = tmp_path / "changed"
    make_minimind(changed, "3", "pth", seed=2)
    tensors = torch.load(changed / "full_sft_64.pth", weights_only=True)
    merged = {name: t + matrices[name][1] @ matrices[name][0] if name in matrices else t for name, t in tensors.items()}
    torch.save(merged, changed / "full_sft_64.pth")
    expected = _tokens(changed)
    assert _tokens(folder, lora=str(folder / "lora_medical_64.pth")) == expected != _tokens(folder)
    alone = tmp_path / "adapters"
    alone.mkdir()
    (folder / "lora_medical_64.pth").rename(alone / "lora_medical_64.pth")
    assert _tokens(folder, lora=str(alone)) == expected


def _peft(folder: Path, prefix: str = "base_model.model.", **config: Any) -> dict[str, Any]:
    """A Llama, and a PEFT adapter of two kinds of its weights; returns the matrices."""
    make_text_model(folder, "llama", seed=3)
    tensors = load_file(folder / "model.safetensors")
    chosen = {n: tuple(t.shape) for n, t in tensors.items() if "v_proj" in n or "down_proj" in n}
    matrices = _matrices(chosen)
    adapter = folder / "adapter"
    adapter.mkdir()
    described = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 12,
        "bias": "none",
        "target_modules": ["v_proj"],
        **config,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    sides = {
        f"{prefix}{name.removesuffix('.weight')}.lora_{side}.weight": pair[i]
        for name, pair in matrices.items()
        for i, side in enumerate("AB")
    }
    save_file(sides, adapter / "adapter_model.safetensors")
    return {"tensors": tensors, "matrices": matrices}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6.0)])
def test_a_peft_folder_equals_changed_weights(tmp_path: Path, rslora: bool, scale: float) -> None:
    made = _peft(tmp_path, use_rslora=rslora)
    with_adapter = _tokens(tmp_path, lora=str(tmp_path / "adapter"))
    plain = _tokens(tmp_path)
    merged = {
        name: t + scale * made["matrices"][name][1] @ made["matrices"][name][0] if name in made["matrices"] else t
        for name, t in made["tensors"].items()
    }
    save_file(merged, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert with_adapter == _tokens(tmp_path) != plain


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    adapter = Adapter(path=tmp_path, matrices={"w": (torch.full((1, 1), 2**-6), torch.full((1, 1), 2**-6))}, scale=1.0)
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    merged = adapter.merged("w", weight)
    assert merged.dtype == torch.float32 and float(merged) == 1 + 2**-12
    assert adapter.merged("other", weight) is weight


def _rewrite(folder: Path, change: Any) -> str:
    file = folder / "lora_medical_64.pth"
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)
    return str(file)


NAME = "model.layers.1.self_attn.q_proj"
DAMAGE: list[tuple[Any, str]] = [
    (lambda t: t.pop(f"{NAME}.lora.A.weight"), rf"missing: the other half of {NAME}\.weight's adapter"),
    (lambda t: t.update({"model.more": torch.ones(1)}), r"unexpected: model\.more"),
    (lambda t: t.update({f"{NAME}.lora.A.weight": torch.ones(RANK, 9)}), rf"wrong shape: the adapter of {NAME}"),
    (lambda t: t.update({f"{NAME}.lora.A.weight": torch.ones(9, 64)}), rf"wrong shape: the adapter of {NAME}"),
    (lambda t: t.update({f"x.lora.{s}.weight": torch.ones(2, 2) for s in "AB"}), r"changes x\.weight, which the check"),
    (
        lambda t: t.update({"lm_head.lora.A.weight": torch.ones(1, 64), "lm_head.lora.B.weight": torch.ones(342, 1)}),
        r"changes lm_head\.weight, which the language half does not read",  # it is the embedding there
    ),
    (lambda t: t.clear(), "holds no flat map"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Any, message: str) -> None:
    folder, _ = _native(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        make_engine(folder, lora=_rewrite(folder, change))


@pytest.mark.parametrize(
    ("config", "word"),
    [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
     ({"peft_type": "IA3"}, "IA3"), ({"r": 0}, "r 0"),
     *(({"init_lora_weights": start}, f"init_lora_weights '{start}'")
       for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "PiSSA")),
     ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
     ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"), ({"fan_in_fan_out": True}, "fan_in_fan_out")],
)  # fmt: skip
def test_adapters_of_other_kinds_are_refused(tmp_path: Path, config: dict[str, Any], word: str) -> None:
    _peft(tmp_path, **config)
    with pytest.raises(CheckpointError, match=word):
        make_engine(tmp_path, lora=str(tmp_path / "adapter"))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", None])
def test_adapters_that_began_in_any_way_beside_the_weights_are_served(tmp_path: Path, start: Any) -> None:
    _peft(tmp_path, init_lora_weights=start, alora_invocation_tokens=None, layer_replication=None, fan_in_fan_out=False)
    assert Adapter.open(tmp_path / "adapter").scale == 3.0


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"one lora_\*\.pth"):
        Adapter.open(tmp_path)
