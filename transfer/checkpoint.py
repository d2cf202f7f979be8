"""Reading checkpoints: named tensors at rest, in safetensors files or in one file of torch.save.

A `Checkpoint` lists what a folder holds, from the headers alone. `load_checkpoint` streams it into preallocated
destinations under a model's rules, strict both ways: every source tensor is consumed exactly once or declared foreign,
every row of every destination is filled exactly once, and all that is wrong comes out in one error before any byte is
read. Knows files, names, dtypes and shapes; what the tensors mean is in the rules, which belong to the models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from transfer.checkpoint_config import config_problems
from transfer.checkpoint_json import CheckpointError as CheckpointError
from transfer.checkpoint_json import read_object
from transfer.checkpoint_rules import Destination, GroupedPart, Part, Planned, Rule, StoredTensor, part, plan
from transfer.checkpoint_torch import find_torch_files, read_torch_header, stream_torch
from transfer.grouped_weights import GroupedWeight

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SMALL = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8, "BOOL": torch.bool}
_DTYPES = {**_FLOATS, **_SMALL, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What `load_checkpoint` did. num_grouped: of the tensors, those stored as whole numbers in groups. fingerprint:
    hex digest of all loaded names and bytes ("" unless asked for)."""

    num_tensors: int
    num_grouped: int
    num_bytes: int
    num_foreign: int
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model folder: its tensors by name, from one safetensors file, from indexed shards, or from one torch file.

    inferred: what was found out about the model otherwise, for what config.json does not say. overrides: entries that
    the user sets against both.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    inferred: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read all headers. Raises CheckpointError when files are missing, damaged, or contradict the index."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(str(folder), ("no such folder; give the folder that holds config.json",))
        index_path = folder / INDEX_FILE
        if index_path.is_file():
            return cls(folder=folder, tensors=_open_shards(folder, _weight_map(folder, index_path)))
        if (folder / SINGLE_FILE).is_file():
            return cls.open_file(folder / SINGLE_FILE)
        found = find_torch_files(folder)
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(str(folder), (f"{names}: several files of weights; leave the one to serve",))
        if found:
            return cls.open_file(found[0])
        wanted = f"neither {SINGLE_FILE} nor {INDEX_FILE} is there, and no pytorch_model.bin, *.pth or *.pt file"
        raise CheckpointError(str(folder), (f"{wanted}; safetensors are preferred",))

    @classmethod
    def open_file(cls, path: Path) -> Checkpoint:
        """What one file holds. Raises CheckpointError when it is missing or damaged."""
        read = _read_header if path.suffix == ".safetensors" else read_torch_header
        problems: list[str] = []
        tensors = {tensor.name: tensor for tensor in read(path, problems)}
        if problems:
            raise CheckpointError(str(path.parent), tuple(problems))
        return cls(folder=path.parent, tensors=tensors)

    def config(self) -> dict[str, Any]:
        """config.json as a map, over what was inferred and under the overrides. Raises CheckpointError when there is
        nothing to override, config.json is not a JSON object, or an entry is of the wrong kind."""
        is_there = not self.inferred or (self.folder / "config.json").is_file()
        stated = self.read_json("config.json") if is_there else {}
        config = {**self.inferred, **stated, **self.overrides}
        if problems := config_problems(config):
            raise CheckpointError(str(self.folder), tuple(problems))
        return config

    def read_json(self, file_name: str) -> dict[str, Any]:
        """A JSON object of the folder. Raises CheckpointError when it is missing or not a JSON object."""
        return read_object(self.folder / file_name)

    @property
    def grouped(self) -> Collection[str]:
        """Names of the matrices that are stored as whole numbers in groups, and come so."""
        return ()

    def stream(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
        """Yield (name, CPU tensor) of these tensors, file by file; nothing is kept once the caller lets go."""
        by_file = sorted(names, key=lambda name: str(self.tensors[name].file))
        for file, group in itertools.groupby(by_file, key=lambda name: self.tensors[name].file):
            try:
                if file.suffix != ".safetensors":
                    yield from stream_torch(file, list(group))
                    continue
                with safe_open(file, framework="pt") as reader:
                    for name in group:
                        yield name, reader.get_tensor(name)
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(str(self.folder), (f"{file.name}: {error}",)) from error

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """These tensors, all at once, in full precision."""
        return {
            name: source.dequantised() if isinstance(source, GroupedWeight) else source
            for name, source in self.stream(names)
        }


def check_checkpoint(
    checkpoint: Checkpoint,
    destinations: Mapping[str, Destination],
    rules: Sequence[Rule],
    *,
    foreign: Sequence[str] = (),
) -> tuple[Planned, int]:
    """What `load_checkpoint` does before it reads anything, with its errors; destinations may be meta tensors.

    Returns {source: (rule, destination)} and the number of foreign names.
    """
    planned, num_foreign, problems = plan(checkpoint.tensors, destinations, rules, foreign)
    if problems:
        raise CheckpointError(str(checkpoint.folder), tuple(problems))
    return planned, num_foreign


def load_checkpoint(
    checkpoint: Checkpoint,
    destinations: Mapping[str, Destination],
    rules: Sequence[Rule],
    *,
    foreign: Sequence[str] = (),
    fingerprint: bool = False,
) -> LoadReport:
    """Copy the checkpoint into `destinations`, converting dtypes; peak extra memory is one tensor.

    foreign: regular expressions of whole names that belong to somebody else and are skipped; a rule that matches wins.
    fingerprint: also digest every loaded tensor (about a second per gigabyte), for content keys.
    Raises CheckpointError naming every missing, unexpected, doubly filled and mis-shaped tensor; destinations are
    untouched then. Raises ValueError when two rules match one name.
    """
    planned, num_foreign = check_checkpoint(checkpoint, destinations, rules, foreign=foreign)
    num_bytes, digests = 0, {}
    with torch.no_grad():
        for name, source in checkpoint.stream(list(planned)):
            rule, target = planned[name]
            tensors = source.tensors if isinstance(source, GroupedWeight) else (source,)
            num_bytes += sum(tensor.nbytes for tensor in tensors)
            if fingerprint:
                digests[name] = "".join(map(_digest, tensors))
            _fill(part(destinations[target], rule), source, rule)
    combined = hashlib.blake2b(repr(sorted(digests.items())).encode(), digest_size=16).hexdigest()
    return LoadReport(
        num_tensors=len(planned),
        num_grouped=sum(name in checkpoint.grouped for name in planned),
        num_bytes=num_bytes,
        num_foreign=num_foreign,
        fingerprint=combined if fingerprint else "",
    )


def _fill(place: Part, source: torch.Tensor | GroupedWeight, rule: Rule) -> None:
    """As whole numbers where the place keeps such, else in full precision."""
    if isinstance(source, GroupedWeight):
        if isinstance(place, GroupedPart) and rule.transform is None:
            place.take_groups(source)
            return
        source = source.dequantised()
    place.copy_(source if rule.transform is None else rule.transform(source))


def _digest(tensor: torch.Tensor) -> str:
    hasher = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    hasher.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _weight_map(folder: Path, index_path: Path) -> dict[str, str]:
    weight_map = read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(folder), (f"{index_path.name} has no weight_map",))
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(str(folder), (f"{index_path.name}: {name} points to {file!r}, not a file name",))
    return weight_map


def _open_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Headers of all shards, which must hold exactly the tensors that the index says, each where it says."""
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    damaged = set()
    for file in sorted(set(weight_map.values())):
        num_problems = len(problems)
        found = _read_header(folder / file, problems)
        if len(problems) > num_problems:
            damaged.add(file)
        for tensor in found:
            tensors[tensor.name] = tensor
            if (said := weight_map.get(tensor.name)) != file:
                where = "the index does not know it" if said is None else f"the index says {said}"
                problems.append(f"{tensor.name} is in {file}, {where}")
    missing = [name for name, file in weight_map.items() if name not in tensors and file not in damaged]
    problems += [f"{name} should be in {weight_map[name]} by the index, and is not" for name in missing]
    if problems:
        raise CheckpointError(str(folder), tuple(problems))
    return tensors


def _read_header(path: Path, problems: list[str]) -> list[StoredTensor]:
    """All tensors of one file; what cannot be read is added to `problems`."""
    found = []
    try:
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - safe_open is not iterable
                part = reader.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    problems.append(f"{path.name}: {name} has the unsupported dtype {part.get_dtype()}")
                    continue
                found.append(StoredTensor(name=name, file=path, dtype=dtype, shape=tuple(part.get_shape())))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, SafetensorError) as error:
        problems.append(f"{path.name} is damaged or cut short: {error}")
    return found
