"""Which stored tensor goes where, and all that is wrong with the answer: accounting on names and shapes.

Strict both ways: every source tensor is consumed exactly once or declared foreign, every row of every destination is
filled exactly once. Destinations may be meta tensors; no file is touched.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from transfer.grouped_weights import GroupedWeight


class Part(Protocol):
    """Rows that a source fills."""

    @property
    def shape(self) -> Sequence[int]: ...

    def copy_(self, source: torch.Tensor, /) -> Any:
        """Take all of `source`, converting what must be."""


@runtime_checkable
class GroupedPart(Protocol):
    """Rows that keep whole numbers in groups as they come."""

    def take_groups(self, source: GroupedWeight, /) -> None:
        """Instead of `copy_`."""


class Destination(Part, Protocol):
    """What sources are copied into: a tensor, or something that keeps its rows in a form of its own."""

    def __getitem__(self, rows: slice, /) -> Part:
        """A range of its rows."""


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


Stored = Mapping[str, StoredTensor]
Planned = dict[str, tuple[Rule, str]]


def plan(
    stored: Stored, destinations: Mapping[str, Destination], rules: Sequence[Rule], foreign: Sequence[str]
) -> tuple[Planned, int, list[str]]:
    """{source: (rule, destination)}, the number of foreign names, and every problem there is (none: it can be loaded).

    Raises ValueError when two rules match one name.
    """
    planned, num_foreign, problems = _assign(stored, rules, foreign)
    problems += _shape_problems(stored, destinations, planned)
    problems += _coverage_problems(stored, destinations, planned, rules)
    return planned, num_foreign, problems


def _assign(stored: Stored, rules: Sequence[Rule], foreign: Sequence[str]) -> tuple[Planned, int, list[str]]:
    """Match every source name with its rule: {source: (rule, destination)}, number of foreign names, problems."""
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    skipped = [re.compile(pattern) for pattern in foreign]
    planned: Planned = {}
    num_foreign, problems = 0, []
    for name in stored:
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


def _shape_problems(stored: Stored, destinations: Mapping[str, Destination], planned: Planned) -> list[str]:
    problems = []
    for name, (rule, target) in planned.items():
        if target not in destinations:
            problems.append(f"unexpected: {name} (the model's configuration has no {target})")
            continue
        tensor = stored[name]
        if not tensor.dtype.is_floating_point and _wants_floats(destinations[target]):
            held = str(tensor.dtype).removeprefix("torch.")
            problems.append(f"wrong dtype: {name} holds {held}; the model wants floating point numbers")
        wanted = tuple(part(destinations[target], rule).shape)
        if _arriving_shape(tensor, rule) != wanted:
            after = "" if rule.transform is None else f", {_arriving_shape(tensor, rule)} as loaded"
            problems.append(f"wrong shape: {name} is {tensor.shape}{after}, the model's configuration wants {wanted}")
    return problems


def _wants_floats(destination: Destination) -> bool:
    """What keeps its rows in a form of its own (quantised matrices) takes floating point numbers, too."""
    return not isinstance(destination, torch.Tensor) or destination.dtype.is_floating_point


def _arriving_shape(stored: StoredTensor, rule: Rule) -> tuple[int, ...] | str:
    if rule.transform is None:
        return stored.shape
    try:
        return tuple(rule.transform(torch.empty(stored.shape, dtype=stored.dtype, device="meta")).shape)
    except (RuntimeError, IndexError, ValueError):
        return "not convertible"


def _coverage_problems(
    stored: Stored, destinations: Mapping[str, Destination], planned: Planned, rules: Sequence[Rule]
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
            problems += _missing(stored, target, gap, rules)
    return problems


def _gaps(covered: Sequence[tuple[int, int]], num_rows: int) -> list[tuple[int, int]]:
    """Row ranges in [0, num_rows) outside the sorted ranges `covered`."""
    gaps, reached = [], 0
    for first, end in [*covered, (num_rows, num_rows)]:
        if first > reached:
            gaps.append((reached, first))
        reached = max(reached, end)
    return gaps


def _missing(stored: Stored, target: str, gap: tuple[int, int], rules: Sequence[Rule]) -> list[str]:
    """Name the source tensors whose rules would fill the gap, as this checkpoint would spell them."""
    found = []
    for rule in rules:
        inside = rule.rows is None or (rule.rows[0] < gap[1] and gap[0] < rule.rows[1])
        if inside and (name := _source_name(stored, rule, target)):
            found.append(f"missing: {name}")
    return found or [f"missing: rows {gap[0]} to {gap[1]} of {target}, for which there is nothing"]


def _source_name(stored: Stored, rule: Rule, target: str) -> str | None:
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
        return sum(other.startswith(stem) for other in stored)

    name = max((spell(""), spell(r"\1")), key=siblings)
    return name if re.fullmatch(rule.pattern, name) else None


def part(destination: Destination, rule: Rule) -> Part:
    """What of a destination the rule's source fills."""
    return destination if rule.rows is None else destination[rule.rows[0] : rule.rows[1]]
