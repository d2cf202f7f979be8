"""Low-rank adapters merged into a checkpoint while it loads: W + scale * B A, in float32, rounded once.

Two layouts: MiniMind's own (`lora_*.pth`: `<module>.lora.A.weight`, `<module>.lora.B.weight`, scale 1) and PEFT's
folders (adapter_config.json beside adapter_model.safetensors or .bin: `base_model.model.<module>.lora_A.weight`, ...,
scale alpha / r). Strict: every tensor of an adapter has a partner and a weight that it fits; the model must read that
weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from transfer.checkpoint import Checkpoint, CheckpointError
from transfer.checkpoint_json import read_object
from transfer.checkpoint_rules import StoredTensor
from transfer.checkpoint_torch import load_state
from transfer.grouped_weights import GroupedWeight

PEFT_CONFIG = "adapter_config.json"
PEFT_UNSERVED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "alora_invocation_tokens", "layer_replication",
    "fan_in_fan_out",
)  # fmt: skip
PEFT_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # those that leave the weights beneath as they are
_NATIVE = re.compile(r"(?P<module>.+)\.lora\.(?P<side>[AB])\.weight")
_PEFT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Matrices of each changed weight by its name: (A [r, in], B [out, r]); what B A is multiplied by."""

    path: Path
    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float

    @classmethod
    def open(cls, path: str | Path) -> Adapter:
        """From a file, or from a folder that holds one. Raises CheckpointError naming all that is wrong."""
        path = Path(path).expanduser()
        if not path.exists():
            raise CheckpointError(str(path), ("no such file or folder; give an adapter's",))
        if (path / PEFT_CONFIG).is_file():
            return cls._paired(path, _peft_tensors(path), _PEFT, _peft_scale(path))
        files = [path] if path.is_file() else sorted(path.glob("lora_*.pth"))
        if len(files) != 1:
            wanted = f"one lora_*.pth, or {PEFT_CONFIG}, is wanted there; found: {[file.name for file in files]}"
            raise CheckpointError(str(path), (wanted,))
        return cls._paired(path, _read(path, files[0]), _NATIVE, 1.0)

    @classmethod
    def _paired(
        cls, path: Path, tensors: Mapping[str, torch.Tensor], pattern: re.Pattern[str], scale: float
    ) -> Adapter:
        sides: dict[str, dict[str, torch.Tensor]] = {}
        problems = []
        for name, tensor in tensors.items():
            match = pattern.fullmatch(name)
            if match is None:
                problems.append(f"unexpected: {name} (no part of a low-rank adapter)")
            else:
                sides.setdefault(match["module"] + ".weight", {})[match["side"]] = tensor
        problems += [f"missing: the other half of {name}'s adapter" for name, pair in sides.items() if len(pair) < 2]
        if not sides:
            problems.append("it holds no adapter")
        if problems:
            raise CheckpointError(str(path), tuple(problems))
        return cls(path=path, matrices={name: (pair["A"], pair["B"]) for name, pair in sides.items()}, scale=scale)

    def problems(self, stored: Mapping[str, StoredTensor]) -> list[str]:
        """Why it does not fit a checkpoint's tensors."""
        found = []
        for name, (down, up) in self.matrices.items():
            made = (up.shape[0], down.shape[-1]) if down.dim() == up.dim() == 2 else None
            if name not in stored:
                found.append(f"the adapter changes {name}, which the checkpoint does not hold")
            elif made is None or up.shape[1] != down.shape[0] or made != stored[name].shape:
                found.append(
                    f"wrong shape: the adapter of {name} is {tuple(up.shape)} times {tuple(down.shape)}, the weight is "
                    f"{stored[name].shape}"
                )
        return found

    def digest(self) -> str:
        """Of all that changes weights, wherever it was read from."""
        hasher = blake2b(repr(self.scale).encode(), digest_size=16)
        for name, pair in sorted(self.matrices.items()):
            for matrix in pair:
                hasher.update(f"{name} {matrix.dtype} {tuple(matrix.shape)}".encode())
                hasher.update(matrix.contiguous().flatten().view(torch.uint8).numpy().data)
        return hasher.hexdigest()

    def merged(self, name: str, source: torch.Tensor | GroupedWeight) -> torch.Tensor | GroupedWeight:
        """The weight as changed; in float32 where it is."""
        if name not in self.matrices:
            return source
        down, up = self.matrices[name]
        weight = source.dequantised() if isinstance(source, GroupedWeight) else source
        return torch.addmm(weight.float(), up.float(), down.float(), alpha=self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose weights come out changed. base: as they are there. used: those that were read so far."""

    base: Checkpoint
    adapter: Adapter
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: str | Path) -> AdaptedCheckpoint:
        """Raises CheckpointError when the adapter cannot be read or does not fit."""
        adapter = Adapter.open(path)
        if problems := adapter.problems(checkpoint.tensors):
            raise CheckpointError(str(adapter.path), tuple(problems))
        return cls(
            folder=checkpoint.folder,
            tensors=checkpoint.tensors,
            inferred=checkpoint.inferred,
            overrides=checkpoint.overrides,
            base=checkpoint,
            adapter=adapter,
        )

    @property
    def grouped(self) -> Collection[str]:
        return self.base.grouped

    def stream(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
        for name, source in self.base.stream(names):
            self.used.add(name)
            yield name, self.adapter.merged(name, source)

    def require_used(self) -> None:
        """Raises CheckpointError when the model, now loaded, has left out a weight that the adapter changes."""
        if left := sorted(self.adapter.matrices.keys() - self.used):
            problems = tuple(f"the adapter changes {name}, which the language half does not read" for name in left)
            raise CheckpointError(str(self.adapter.path), problems)


def _read(folder: Path, file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_state(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(folder), (str(error),)) from error


def _peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "adapter_model.bin").is_file():
        return _read(folder, folder / "adapter_model.bin")
    opened = Checkpoint.open_file(folder / "adapter_model.safetensors")
    return opened.read(list(opened.tensors))


def _peft_scale(folder: Path) -> float:
    """Raises CheckpointError for what would change the numbers in another way."""
    config: Any = read_object(folder / PEFT_CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    wrong = [name for name in PEFT_UNSERVED if config.get(name)]
    if (start := config.get("init_lora_weights", True)) not in PEFT_STARTS:
        wrong.append(f"init_lora_weights {start!r} (it changes the weights beneath; convert it to a plain adapter)")
    if config.get("bias", "none") != "none":
        wrong.append("bias")
    if config.get("peft_type", "LORA") != "LORA" or wrong:
        what = ", ".join(wrong) or f"peft_type {config.get('peft_type')!r}"
        raise CheckpointError(str(folder), (f"{PEFT_CONFIG} asks for {what}, which is not served",))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise CheckpointError(
            str(folder), (f"{PEFT_CONFIG} has r {rank!r} and lora_alpha {alpha!r}; numbers are needed",)
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
