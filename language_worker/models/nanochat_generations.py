"""The generations of nanochat: what changed from one to the next, and which one a checkpoint is of.

The constants of a generation are not in its checkpoints; the names and shapes of the tensors tell it apart.

    generation          0 (2025)  1 (11 Jan 2026)  2 (16 Jan)  3 (9 Mar)  4 (14 Mar)
    lambdas                       x                x           x          x
    value embeddings                               gate of 32  gate of 12 gate of 12
    smear and backout                                                     x

What fits none of them is refused, unless the user names the generation. Pure: names, shapes and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from language_worker.errors import ModelNotSupported

LAMBDAS = frozenset({"resid_lambdas", "x0_lambdas"})
SMEAR = frozenset({"smear_gate.weight", "smear_lambda", "backout_lambda"})
_GATE = re.compile(r"transformer\.h\.\d+\.attn\.ve_gate\.weight")
_VALUE_EMBEDDING = re.compile(r"value_embeds\.\d+\.weight")
_TRANSIENT = re.compile(r"value_embed_[AB].*|v0_lambdas|.*\.v0_lambdas?")  # of 16 January, for hours

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """Constants of one generation. A short window is the sequence length by `short_divisor`, rounded up to a multiple
    of `short_multiple` (1: rounded down)."""

    rope_base: float = 10_000.0
    qk_scale: float = 1.0
    has_windows: bool = True
    has_lambdas: bool = True
    gate_width: int = 0
    gate_scale: float = 0.0
    smear_width: int = 0
    short_divisor: int = 2
    short_multiple: int = 1

    def windows(self, pattern: str, sequence_len: int, num_layers: int) -> tuple[int, ...]:
        """Keys before its own that a query sees, by layer; the pattern is repeated, the last layer is always long."""
        letters = pattern.upper() or "L"
        if set(letters) - {"L", "S"}:
            raise ModelNotSupported(f"window_pattern is {pattern!r}; only the letters L and S have a meaning")
        if not self.has_windows:
            if "S" in letters:
                raise ModelNotSupported(f"window_pattern is {pattern!r}, and generation 0 has no windows")
            return (0,) * num_layers
        sizes = {"L": sequence_len, "S": self.short_window(sequence_len)}
        return (*(sizes[letters[i % len(letters)]] for i in range(num_layers - 1)), sequence_len)

    def short_window(self, sequence_len: int) -> int:
        if self.short_multiple == 1:
            return sequence_len // self.short_divisor
        return -(-sequence_len // (self.short_divisor * self.short_multiple)) * self.short_multiple


_THIRD = Generation(
    rope_base=100_000.0, qk_scale=1.15, gate_width=12, gate_scale=3.0, short_divisor=3, short_multiple=128
)
GENERATIONS = (
    Generation(has_windows=False, has_lambdas=False),
    Generation(),
    Generation(gate_width=32, gate_scale=2.0),
    _THIRD,
    Generation(
        rope_base=100_000.0, qk_scale=1.2, gate_width=12, gate_scale=3.0, smear_width=24, short_divisor=4,
        short_multiple=128,
    ),
)  # fmt: skip


def detect_generation(shapes: Shapes) -> int:
    """The generation whose tensors these are; ModelNotSupported says what is contradictory."""
    transient = sorted(name for name in shapes if _TRANSIENT.fullmatch(name))
    if transient:
        raise _ambiguous(f"{', '.join(transient)} were in use for hours on 16 January 2026 only")
    lambdas, smear = LAMBDAS & shapes.keys(), SMEAR & shapes.keys()
    has_values = any(_VALUE_EMBEDDING.fullmatch(name) for name in shapes)
    widths = {shape[-1] for name, shape in shapes.items() if _GATE.fullmatch(name) and shape}
    for found, wanted in ((lambdas, LAMBDAS), (smear, SMEAR)):
        if found and found != wanted:
            raise _ambiguous(f"{', '.join(sorted(found))} is there and {', '.join(sorted(wanted - found))} is not")
    if has_values != bool(widths):
        raise _ambiguous("value embeddings and their gates (ve_gate) go together, and only one of them is there")
    if not lambdas:
        if has_values or smear:
            raise _ambiguous("there are value embeddings or a smear gate, and no resid_lambdas")
        return 0
    if not has_values:
        if smear:
            raise _ambiguous("there is a smear gate, and there are no value embeddings")
        return 1
    for number in (2, 3, 4):
        generation = GENERATIONS[number]
        if widths == {generation.gate_width} and bool(smear) == bool(generation.smear_width):
            return number
    gates = f"the gates of value embeddings (ve_gate) read {', '.join(map(str, sorted(widths)))} channels"
    beside = "beside" if smear else "without"
    raise _ambiguous(f"{gates}, {beside} a smear gate; known are 32 without it, and 12 with and without it")


def _ambiguous(what: str) -> ModelNotSupported:
    known = f"0 to {len(GENERATIONS) - 1}"
    return ModelNotSupported(
        f"this nanochat checkpoint is of no generation that is known ({what}); if you know better, set "
        f"config_overrides: {{generation: N}}, N from {known}"
    )
