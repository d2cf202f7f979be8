"""Reading safetensors checkpoints: named tensors at rest.

A `Checkpoint` lists what a folder holds, from the headers alone. `load_checkpoint` streams it into preallocated
destinations under a model's rules, strict both ways: every source tensor is consumed exactly once or declared foreign,
every row of every destination is filled exactly once, and all that is wrong comes out in one error before any byte is
read. Knows files, names, dtypes and shapes; what the tensors mean is in the rules, which belong to the models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from transfer.errors import TransferError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SMALL = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8, "BOOL": torch.bool}
_DTYPES = {**_FLOATS, **_SMALL, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}


class CheckpointError(TransferError):
    """A model folder cannot be read, or does not hold what the model needs. `problems` names every finding."""

    def __init__(self, folder: str, problems: tuple[str, ...]) -> None:
        super().__init__(folder, problems)
        self.folder = folder
        self.problems = problems

    def __str__(self) -> str:
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        return f"checkpoint {self.folder} cannot be loaded, {len(self.problems)} problem(s):{listed}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: its name, where it lies, and what its header says."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Where source tensors go.

    pattern: regular expression that a whole source name matches. target: destination name, a template as of
    `re.Match.expand` (`\\1` is the first group). rows: (first, end) rows of a fused destination that the source fills,
    None for all of it. transform: applied to the source before it is compared and copied; must work on meta tensors.
    """

    pattern: str
    target: str
    rows: tuple[int, int] | None = None
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What `load_checkpoint` did. fingerprint: hex digest of all loaded names and bytes ("" unless asked for)."""

    num_tensors: int
    num_bytes: int
    num_foreign: int
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A Hugging Face model folder: its tensors by name, from one safetensors file or from indexed shards."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

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
            problems: list[str] = []
            tensors = {tensor.name: tensor for tensor in _read_header(folder / SINGLE_FILE, problems)}
            if problems:
                raise CheckpointError(str(folder), tuple(problems))
            return cls(folder=folder, tensors=tensors)
        wanted = f"neither {SINGLE_FILE} nor {INDEX_FILE} is there; only safetensors checkpoints are read"
        raise CheckpointError(str(folder), (wanted,))

    def config(self) -> dict[str, Any]:
        """config.json as a map. Raises CheckpointError when it is missing or not a JSON object."""
        return self.read_json("config.json")

    def read_json(self, file_name: str) -> dict[str, Any]:
        """A JSON object of the folder. Raises CheckpointError when it is missing or not a JSON object."""
        return _read_json(self.folder, self.folder / file_name)

    def stream(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, CPU tensor) of these tensors, file by file; nothing is kept once the caller lets go."""
        by_file = sorted(names, key=lambda name: str(self.tensors[name].file))
        for file, group in itertools.groupby(by_file, key=lambda name: self.tensors[name].file):
            try:
                with safe_open(file, framework="pt") as reader:
                    for name in group:
                        yield name, reader.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(str(self.folder), (f"{file.name}: {error}",)) from error


def load_checkpoint(
    checkpoint: Checkpoint,
    destinations: Mapping[str, torch.Tensor],
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
    planned, num_foreign, problems = _assign(checkpoint, rules, foreign)
    problems += _shape_problems(checkpoint, destinations, planned)
    problems += _coverage_problems(checkpoint, destinations, planned, rules)
    if problems:
        raise CheckpointError(str(checkpoint.folder), tuple(problems))
    num_bytes, digests = 0, {}
    with torch.no_grad():
        for name, tensor in checkpoint.stream(list(planned)):
            rule, target = planned[name]
            num_bytes += tensor.numel() * tensor.element_size()
            if fingerprint:
                digests[name] = _digest(tensor)
            value = tensor if rule.transform is None else rule.transform(tensor)
            _part(destinations[target], rule).copy_(value)
    combined = hashlib.blake2b(repr(sorted(digests.items())).encode(), digest_size=16).hexdigest()
    return LoadReport(
        num_tensors=len(planned),
        num_bytes=num_bytes,
        num_foreign=num_foreign,
        fingerprint=combined if fingerprint else "",
    )


_Planned = dict[str, tuple[Rule, str]]


def _assign(checkpoint: Checkpoint, rules: Sequence[Rule], foreign: Sequence[str]) -> tuple[_Planned, int, list[str]]:
    """Match every source name with its rule: {source: (rule, destination)}, number of foreign names, problems."""
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    skipped = [re.compile(pattern) for pattern in foreign]
    planned: _Planned = {}
    num_foreign, problems = 0, []
    for name in checkpoint.tensors:
        matches = [(match, rule) for regex, rule in compiled if (match := regex.fullmatch(name))]
        if len(matches) > 1:
            raise ValueError(f"tensor {name!r} is claimed by {len(matches)} rules: {[rule for _, rule in matches]}")
        if matches:
            match, rule = matches[0]
            planned[name] = (rule, match.expand(rule.target))
        elif any(regex.fullmatch(name) for regex in skipped):
            num_foreign += 1
        else:
            problems.append(f"unexpected: {name} (the model has no such tensor)")
    return planned, num_foreign, problems


def _shape_problems(checkpoint: Checkpoint, destinations: Mapping[str, torch.Tensor], planned: _Planned) -> list[str]:
    problems = []
    for name, (rule, target) in planned.items():
        if target not in destinations:
            problems.append(f"unexpected: {name} (the model's configuration has no {target})")
            continue
        stored = checkpoint.tensors[name]
        wanted = tuple(_part(destinations[target], rule).shape)
        if _arriving_shape(stored, rule) != wanted:
            after = "" if rule.transform is None else f", {_arriving_shape(stored, rule)} as loaded"
            problems.append(f"wrong shape: {name} is {stored.shape}{after}, the model's configuration wants {wanted}")
    return problems


def _arriving_shape(stored: StoredTensor, rule: Rule) -> tuple[int, ...] | str:
    if rule.transform is None:
        return stored.shape
    try:
        return tuple(rule.transform(torch.empty(stored.shape, dtype=stored.dtype, device="meta")).shape)
    except (RuntimeError, IndexError, ValueError):
        return "not convertible"


def _coverage_problems(
    checkpoint: Checkpoint, destinations: Mapping[str, torch.Tensor], planned: _Planned, rules: Sequence[Rule]
) -> list[str]:
    """Every destination must be tiled by its sources, without gap or overlap."""
    filled: dict[str, list[tuple[int, int, str]]] = {target: [] for target in destinations}
    for name, (rule, target) in planned.items():
        if target in filled:
            first, end = rule.rows or (0, destinations[target].shape[0])
            filled[target].append((first, end, name))
    problems = []
    for target, parts in filled.items():
        parts.sort()
        for (_, end, name), (first, _, other) in itertools.pairwise(parts):
            if first < end:
                problems.append(f"ambiguous: {name} and {other} both hold {target}")
        covered = [(first, end) for first, end, _ in parts]
        for gap in _gaps(covered, destinations[target].shape[0]):
            problems += _missing(checkpoint, target, gap, rules)
    return problems


def _gaps(covered: Sequence[tuple[int, int]], num_rows: int) -> list[tuple[int, int]]:
    """Row ranges in [0, num_rows) outside the sorted ranges `covered`."""
    gaps, reached = [], 0
    for first, end in [*covered, (num_rows, num_rows)]:
        if first > reached:
            gaps.append((reached, first))
        reached = max(reached, end)
    return gaps


def _missing(checkpoint: Checkpoint, target: str, gap: tuple[int, int], rules: Sequence[Rule]) -> list[str]:
    """Name the source tensors whose rules would fill the gap, as this checkpoint would spell them."""
    found = []
    for rule in rules:
        inside = rule.rows is None or (rule.rows[0] < gap[1] and gap[0] < rule.rows[1])
        if inside and (name := _source_name(checkpoint, rule, target)):
            found.append(f"missing: {name}")
    return found or [f"missing: rows {gap[0]} to {gap[1]} of {target}, for which there is nothing"]


def _source_name(checkpoint: Checkpoint, rule: Rule, target: str) -> str | None:
    """The source name that `rule` would send to `target`, None if the rule never does.

    Runs the rule backwards: groups are read off the target and put into the pattern. An optional `(?:...)?` is kept
    or dropped, whichever has more siblings in the checkpoint.
    """
    template = re.escape(rule.target).replace("\\\\", "\\")
    groups = re.fullmatch(re.sub(r"\\(\d)", r"(?P<g\1>[^.]+)", template), target)
    if groups is None:
        return None

    def spell(optional: str) -> str:
        text = re.sub(r"\(\?:([^()]*)\)\?", optional, rule.pattern)
        values = iter(range(1, 10))
        text = re.sub(r"\((?!\?)[^()]*\)", lambda _: groups.group(f"g{next(values)}"), text)
        return text.replace("\\", "")

    def siblings(name: str) -> int:
        stem = ".".join(name.split(".")[:2]) + "."
        return sum(other.startswith(stem) for other in checkpoint.tensors)

    name = max((spell(""), spell(r"\1")), key=siblings)
    return name if re.fullmatch(rule.pattern, name) else None


def _part(destination: torch.Tensor, rule: Rule) -> torch.Tensor:
    return destination if rule.rows is None else destination[rule.rows[0] : rule.rows[1]]


def _digest(tensor: torch.Tensor) -> str:
    hasher = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    hasher.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(str(folder), (f"{path.name} is missing",)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(str(folder), (f"{path.name} is not readable JSON: {error}",)) from error
    if not isinstance(value, dict):
        raise CheckpointError(str(folder), (f"{path.name} must hold a JSON object, not {type(value).__name__}",))
    return value


def _weight_map(folder: Path, index_path: Path) -> dict[str, str]:
    weight_map = _read_json(folder, index_path).get("weight_map")
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
