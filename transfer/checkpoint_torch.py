"""Weights as `torch.save` wrote them: one file that holds a flat map of tensors.

Read with weights_only, so that a file can hold tensors and nothing that runs, and mapped into memory, so that a header
costs no read of the numbers. A training state keeps the map beside the optimizer's; then the map is taken. Prefixes
that wrappers put before every name are left out. Knows names and shapes, not models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transfer.checkpoint_rules import StoredTensor

HF_FILE = "pytorch_model.bin"
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
NAMED_FILES = (HF_FILE, DEEPSPEED_FILE, "best_model.pt", "final_model.pt")  # each is the one to take, if it is there
STEP_FILE = re.compile(r"(?:model|checkpoint_step)_(\d+)\.pt")
PATTERNS = ("*.pth", "*.pt")
WRAPPERS = ("module.", "_orig_mod.")
STATE_KEYS = ("model", "model_state_dict", "state_dict", "module")  # where a training state keeps the weights
ADAPTERS = "lora_"  # how the names of files begin that hold no whole model


def find_torch_files(folder: Path) -> list[Path]:
    """Files of the folder that may hold a model's weights: the first of NAMED_FILES alone, else the last training
    step's `model_{step}.pt` or `checkpoint_step_{step}.pt`, else every *.pth and *.pt."""
    if (named := next((folder / name for name in NAMED_FILES if (folder / name).is_file()), None)) is not None:
        return [named]
    steps = {int(match[1]): path for path in folder.iterdir() if (match := STEP_FILE.fullmatch(path.name))}
    if steps:
        return [steps[max(steps)]]
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if not path.name.startswith(ADAPTERS)}
    return sorted(found)


def read_torch_header(path: Path, problems: list[str]) -> list[StoredTensor]:
    """All tensors of one file; what cannot be read is added to `problems`."""
    try:
        state = load_state(path)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return []
    except ValueError as error:
        problems.append(str(error))
        return []
    return [
        StoredTensor(name=name, file=path, dtype=tensor.dtype, shape=tuple(tensor.shape))
        for name, tensor in state.items()
    ]


def stream_torch(path: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, CPU tensor) of these tensors. Raises ValueError, or OSError."""
    state = load_state(path)
    for name in names:
        yield name, state[name]


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """{name without wrappers: tensor, mapped from the file}. Raises FileNotFoundError, or ValueError saying what is
    wrong with the file."""
    state = _state(_load(path))
    if state is None:
        raise ValueError(f"{path.name} holds no flat map of tensors, nor one under {', '.join(STATE_KEYS)}")
    named: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        bare = _without_wrappers(name)
        if bare in named:
            raise ValueError(f"{path.name} holds {bare} twice")
        named[bare] = tensor
    return named


def load_entry(path: Path, name: str) -> Any:
    """What a training state keeps under `name` beside its weights; None where there is no such entry, or the file is
    none of torch.save's. Raises as `load_state`."""
    loaded = None if path.suffix == ".safetensors" else _load(path)
    return loaded.get(name) if isinstance(loaded, Mapping) else None


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged or hostile archive fails in many ways
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path.name} cannot be read as a map of tensors: {type(error).__name__}: {reason}") from error


def _state(loaded: Any) -> Mapping[str, torch.Tensor] | None:
    if not isinstance(loaded, Mapping):
        return None
    if loaded and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()):
        return loaded
    inner = next((loaded[key] for key in STATE_KEYS if isinstance(loaded.get(key), Mapping)), None)
    return None if inner is None else _state(inner)


def _without_wrappers(name: str) -> str:
    while prefix := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None):
        name = name[len(prefix) :]
    return name
