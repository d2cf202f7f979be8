"""What `compile_kernels` compiles besides norms, activations and attention: sampling, blocks, 8-bit and 4-bit numbers,
state space, experts. Widths and tiles are those of real models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from kernels._triton import (
    blocks,
    causal_conv,
    experts,
    gates,
    quantise,
    quantised_linear,
    sampling,
    selection,
    selective_scan,
)

Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
INDEX_POINTERS = ("ids_ptr", "slots_ptr", "rows_ptr", "streams_ptr", "sources_ptr", "targets_ptr", "places_ptr")


def variant(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    warps: int,
    pointers: dict[str, str],
    *,
    default: str = "*fp32",
    floats: tuple[str, ...] = (),
) -> Variant:
    """One variant: pointers not named are of type `default`, numbers are int32 unless they are among `floats`."""
    types = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument.endswith("_ptr"):
            is_index = argument.endswith(INDEX_POINTERS)
            types[argument] = pointers.get(argument, "*i64" if is_index else default)
        else:
            types[argument] = "fp32" if argument in floats else "i32"
    return name, kernel, types, constants, {"num_warps": warps}


def variants() -> Iterator[Variant]:
    """(name, kernel, argument types, constants, options) of everything these launchers ask for on real models."""
    for dtype, pointer in TYPES.items():
        yield from _sampling(dtype, pointer)
    yield from _blocks("*bf16")
    for pointer in ("*fp32", "*bf16"):
        yield from _numbers(pointer)
        yield from _state_space(pointer)
        yield from _experts(pointer)
    for rule in selection.RULES.values():
        constants = {"RULE": rule, "LENGTH": 256}
        pointers = {"open_ptr": "*i8", "out_ptr": "*i8"}
        yield variant(f"select rule {rule}", selection.select_kernel, constants, 4, pointers)


def _sampling(dtype: torch.dtype, pointer: str) -> Iterator[Variant]:
    short, block, warps = pointer[1:], {"BLOCK": sampling.BLOCK}, sampling.WARPS
    logits, places = {"logits_ptr": pointer}, {"place_ptr": "*i32"}
    yield variant(f"statistics {short}", sampling.statistics_kernel, block, warps, logits | places)
    keys = {f"{name}_ptr": "*i64" for name in ("seeds", "samples", "positions", "last_tie", "top_k")}
    for cut in (False, True):
        constants = {"CUT": cut, **block}
        yield variant(f"draw {short} cut {cut}", sampling.draw_kernel, constants, warps, logits | places | keys)
    constants = {"SHIFT": sampling.SHIFTS[dtype], "BLOCK": sampling.CUT_BLOCK}
    yield variant(f"cut {short}", sampling.cut_kernel, constants, warps, logits | keys)
    if pointer == "*fp32":
        parts = {"PARTS": sampling.MAX_PARTS}
        found = {"argmax_ptr": "*i64", "out_ptr": "*i64"}
        yield variant("merge statistics", sampling.merge_statistics_kernel, parts, 1, places | found)
        yield variant("merge draws", sampling.merge_draws_kernel, parts, 1, places | found)


def _blocks(pointer: str) -> Iterator[Variant]:
    short = pointer[1:]
    for store in (False, True):
        constants = {"STORE": store, "BLOCK": 4096}
        pointers = {"tables_ptr": "*i32"}
        yield variant(f"rows {short} store {store}", blocks.rows_kernel, constants, 8, pointers, default=pointer)
    constants = {"HEADS": 8, "DIM": 128}
    yield variant(f"convert {short}", blocks.convert_kernel, constants, 4, {}, default=pointer)
    constants = {"PIECE": blocks.PIECE}
    yield variant(f"copy pages {short}", blocks.copy_pages_kernel, constants, 8, {}, default=pointer)


def _numbers(pointer: str) -> Iterator[Variant]:
    short = pointer[1:]
    rows, block = quantise.tile(128)
    tile = {"ROWS": rows, "BLOCK": block}
    for narrow, slots in itertools.product(("*i8", "*fp8e4nv"), (False, True)):
        name = f"{short} {'int8' if narrow == '*i8' else 'float8'} slots {slots}"
        constants = {"SLOTS": slots, "INTEGER": narrow == "*i8", **tile}
        pointers = {"x_ptr": pointer, "out_ptr": pointer, "values_ptr": narrow}
        yield variant(f"quantise {name}", quantise.quantise_kernel, constants, 4, pointers, floats=("largest",))
        constants = {"SLOTS": slots, **tile}
        yield variant(f"dequantise {name}", quantise.dequantise_kernel, constants, 4, pointers)
    columns = quantised_linear.COLUMNS
    for rows in (16, 32) if pointer != "*fp32" else (16,):
        for split in (False, True):
            shared = {"BIAS": not split, "SPLIT": split, "UPCAST": False, "ROWS": rows, "COLUMNS": columns}
            pointers = {"x_ptr": pointer, "bias_ptr": pointer, "out_ptr": "*fp32" if split else pointer}
            name = f"{short} {rows} rows{' split' if split else ''}"
            constants, warps = shared | {"INPUTS": quantised_linear.INPUTS}, quantised_linear.warps_of(rows)
            yield variant(
                f"int8 linear {name}", quantised_linear.int8_kernel, constants, warps, pointers | {"weight_ptr": "*i8"}
            )
            numbers = pointers | {"packed_ptr": "*u8", "zeros_ptr": "*u8"}
            for zeros in (False, True):
                constants, kernel = shared | {"HALF": 64, "ZEROS": zeros}, quantised_linear.int4_kernel
                yield variant(f"int4 linear {name} zeros {zeros}", kernel, constants, warps, numbers)
    constants = {"BIAS": True, "BLOCK": 256}
    pointers = {"bias_ptr": pointer, "out_ptr": pointer}
    yield variant(f"add up {short}", quantised_linear.add_up_kernel, constants, 2, pointers)


def _experts(pointer: str) -> Iterator[Variant]:
    short, dtype = pointer[1:], torch.float32 if pointer == "*fp32" else torch.bfloat16
    index = dict.fromkeys(("offsets_ptr", "tokens_ptr"), "*i64")
    for rows_per_expert in (1, 32, 64, 512) if pointer == "*bf16" else (1, 512):
        rows, warps = experts.tile(rows_per_expert, dtype)
        constants = {"GATHER": True, "UPCAST": False, "EXPERTS": 128, "ROWS": rows, "COLUMNS": experts.COLUMNS,
                     "INPUTS": 32 if pointer == "*fp32" else experts.INPUTS}  # fmt: skip
        kernel = experts.grouped_matmul_kernel
        yield variant(f"grouped matmul {short} {rows}", kernel, constants, warps, index, default=pointer)
    pointers = {"rows_ptr": pointer, "out_ptr": pointer}
    yield variant(f"combine {short}", experts.combine_kernel, {"BLOCK": 2048}, 8, pointers)
    for formula, number in gates.FORMULAS.items() if pointer == "*bf16" else ():
        constants = {"FORMULA": number, "BLOCK": gates.BLOCK}
        yield variant(f"{formula} {short}", gates.gate_kernel, constants, 4, {}, default=pointer, floats=("cap",))


def _state_space(pointer: str) -> Iterator[Variant]:
    short = pointer[1:]
    inputs = {f"{name}_ptr": pointer for name in ("x", "dt", "b", "c", "gate", "skip", "bias", "out")}
    tables = {"pieces_ptr": "*i32", "sequences_ptr": "*i32"}
    for size in (16, 64) if pointer == "*bf16" else (64,):
        tile = {"CHANNELS": selective_scan.CHANNELS, "SIZE": size}
        for name, single, final, carried in (
            ("whole", False, False, False),
            ("update", True, False, False),
            ("final", False, True, True),
            ("carried", False, False, True),
        ):
            constants = {"SINGLE": single, "FINAL": final, "CARRIED": carried, "GATE": True, "BIAS": True, **tile}
            label = f"scan {short} {name} {size}"
            yield variant(label, selective_scan.scan_kernel, constants, selective_scan.WARPS, inputs | tables)
        if pointer == "*fp32":
            yield variant(f"carry {size}", selective_scan.carry_kernel, tile, selective_scan.WARPS, tables)
    shared = {"WIDTH": 4, "CHANNELS": causal_conv.CHANNELS}
    flags = {"BIAS": True, "SILU": True}
    pointers = {"tails_ptr": pointer, "weight_ptr": pointer} | inputs | tables
    constants = shared | flags | {"TOKENS": causal_conv.TOKENS}
    yield variant(f"conv {short}", causal_conv.conv_kernel, constants, 4, pointers)
    yield variant(f"conv update {short}", causal_conv.update_kernel, shared | flags, 1, pointers)
    yield variant(f"conv tail {short}", causal_conv.tail_kernel, shared, 1, pointers)
