"""Checkpoints whose matrices are stored quantised, seen as if each were one tensor again.

`q_proj.qweight`, `.qzeros`, `.scales` (or whatever the layout calls them) become `q_proj.weight`, of the shape that a
model wants, and are streamed as a GroupedWeight. What lacks a part, has one too many, or does not fit together is named
before any byte is read. Whatever the configuration lists as left alone is there as a plain tensor, and stays one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from transfer.checkpoint import Checkpoint
from transfer.checkpoint_json import CheckpointError
from transfer.checkpoint_rules import StoredTensor
from transfer.grouped_weights import GroupedWeight
from transfer.packed_layouts import AwqLayout, CompressedLayout, GptqLayout, PackedLayout
from transfer.quantisation_config import PLACE, UnreadLayout, read_layout, stated_section

SUFFIXES = {*GptqLayout.suffixes, *AwqLayout.suffixes, *CompressedLayout.suffixes}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantisedCheckpoint(Checkpoint):
    """See the module. stored: the checkpoint as it lies there. parts: by a matrix's name, its tensors' by suffix."""

    stored: Checkpoint
    layout: PackedLayout
    parts: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint so seen; itself where config.json says nothing of quantisation.

        Raises CheckpointError for a method or layout that is not read, and for tensors that do not fit it.
        """
        section = stated_section(checkpoint.config())
        if not section:
            return checkpoint
        try:
            layout = read_layout(section)
        except UnreadLayout as error:
            raise CheckpointError(str(checkpoint.folder), (str(error),)) from error
        problems: list[str] = []
        parts = _gathered(checkpoint.tensors, layout, problems)
        tensors = _seen(checkpoint.tensors, layout, parts, problems)
        if problems:
            raise CheckpointError(str(checkpoint.folder), tuple(problems))
        return cls(
            folder=checkpoint.folder,
            tensors=tensors,
            inferred=checkpoint.inferred,
            overrides=checkpoint.overrides,
            stored=checkpoint,
            layout=layout,
            parts=parts,
        )

    @property
    def grouped(self) -> Collection[str]:
        return self.parts.keys()

    def stream(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
        """As a checkpoint does; a matrix comes once the last of its parts was read, wherever they lie."""
        places = {part: (name, kind) for name in names for kind, part in self.parts.get(name, {}).items()}
        plain = [name for name in names if name not in self.parts]
        held: dict[str, dict[str, torch.Tensor]] = {}
        for source, tensor in self.stored.stream([*plain, *places]):
            if source not in places or isinstance(tensor, GroupedWeight):
                yield source, tensor
                continue
            name, kind = places[source]
            held.setdefault(name, {})[kind] = tensor
            if len(held[name]) == len(self.parts[name]):
                yield name, self._read(name, held.pop(name))

    def _read(self, name: str, parts: dict[str, torch.Tensor]) -> GroupedWeight:
        try:
            return self.layout.read(parts)
        except ValueError as error:
            raise CheckpointError(str(self.folder), (f"{name.removesuffix('weight')}{error}",)) from error


def _gathered(
    stored: Mapping[str, StoredTensor], layout: PackedLayout, problems: list[str]
) -> dict[str, dict[str, str]]:
    """By matrix, its tensors' names by suffix; each has all that the layout needs and nothing that it does not know."""
    parts: dict[str, dict[str, str]] = {}
    for name in stored:
        stem, _, suffix = name.rpartition(".")
        if stem and suffix in SUFFIXES:
            parts.setdefault(f"{stem}.weight", {})[suffix] = name
    for name, found in parts.items():
        stem = name.removesuffix("weight")
        problems += [f"missing: {stem}{kind} (of {layout.name})" for kind in layout.needed if kind not in found]
        problems += [
            f"unexpected: {own} ({layout.name} has no such tensor)"
            for kind, own in found.items()
            if kind not in layout.suffixes
        ]
        if name in stored:
            problems.append(f"ambiguous: {name} and {', '.join(found.values())} both hold {name}")
    if not parts:
        wanted = layout.suffixes[0]
        problems.append(f"missing: *.{wanted}: {PLACE} says {layout.name}, and no matrix is stored so")
    return parts


def _seen(
    stored: Mapping[str, StoredTensor],
    layout: PackedLayout,
    parts: Mapping[str, Mapping[str, str]],
    problems: list[str],
) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint, with each matrix in the place of its parts."""
    owned = {own for found in parts.values() for own in found.values()}
    tensors = {name: tensor for name, tensor in stored.items() if name not in owned}
    for name, found in parts.items():
        if not {*layout.needed} <= found.keys() <= {*layout.suffixes}:
            continue  # which was said
        wrong = _misfits(stored, layout, found)
        problems += wrong
        if not wrong:
            words, scales = stored[found[layout.suffixes[0]]], stored[found[layout.scales]]
            shape = layout.shape(words.shape)
            tensors[name] = StoredTensor(name=name, file=words.file, dtype=scales.dtype, shape=shape)
    return tensors


def _misfits(stored: Mapping[str, StoredTensor], layout: PackedLayout, found: Mapping[str, str]) -> list[str]:
    """Parts of a matrix whose dtype or shape is not the layout's."""
    wrong = []
    for kind, own in found.items():
        dtype = stored[own].dtype
        if dtype.is_floating_point != (kind == layout.scales) or (kind in layout.packed and dtype != torch.int32):
            name, wanted = str(dtype).removeprefix("torch."), "floats" if kind == layout.scales else "int32"
            wrong.append(f"wrong dtype: {own} holds {name}; {layout.name} stores {wanted}")
    words = stored[found[layout.suffixes[0]]]
    if len(words.shape) != 2 or not all(words.shape):
        return [*wrong, f"wrong shape: {words.name} is {words.shape}; {layout.name} stores a matrix of words"]
    out, inputs = layout.shape(words.shape)
    for kind, shape in layout.shapes(out, inputs).items():
        if kind in found and (held := stored[found[kind]].shape) != shape:
            wrong.append(
                f"wrong shape: {found[kind]} is {held}; {layout.name} wants {shape} for {inputs} inputs and {out} "
                f"outputs, of {layout.bits} bits in groups of {layout.group_size or inputs}"
            )
    return wrong
