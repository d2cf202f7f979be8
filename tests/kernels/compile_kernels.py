"""Compile every shipped Triton kernel ahead of time and print what each needs, as JSON lines. Needs no GPU.

    python -m tests.kernels.compile_kernels [transformer|serving] [80 90 100]

Runs without TRITON_INTERPRET. Registers and spills come from the cuobjdump that Triton bundles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels._triton import activation, attention, norm, pages, rotary, varlen_attention

MASKS = (("sliding", 1, 1024), ("bidirectional", 0, 0), ("blocks of 32", 32, 0))  # (name, block length, window)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}  # float16 compiles to the same with other instructions


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, argument types, constants, options) of everything the launchers ask for on real models."""
    for dtype, pointer in TYPES.items():
        short = pointer[1:]
        for width in (128, 1280, 3584):
            rows, block, warps = norm.tile(width)
            for residual in (False, True):
                yield (
                    f"rms_norm {short} {width}{' +residual' if residual else ''}", norm.rms_norm_kernel,
                    {"x_ptr": pointer, "residual_ptr": pointer, "weight_ptr": pointer, "out_ptr": pointer,
                     "x_stride": "i32", "residual_stride": "i32", "num_rows": "i32", "width": "i32", "eps": "fp32"},
                    {"HAS_RESIDUAL": residual, "HAS_WEIGHT": True, "ROUND": residual,
                     "ROWS": rows, "BLOCK": block}, {"num_warps": warps},
                )  # fmt: skip
            if width == 128:
                yield (
                    f"rms_norm_heads {short} {width}", norm.rms_norm_heads_kernel,
                    {"x_ptr": pointer, "weight_ptr": pointer, "out_ptr": pointer, "eps": "fp32", **dict.fromkeys(
                        ("token_stride", "head_stride", "num_rows", "num_heads", "width"), "i32")},
                    {"ROWS": rows, "BLOCK": block}, {"num_warps": warps},
                )  # fmt: skip
            yield (
                f"layer_norm {short} {width}", norm.layer_norm_kernel,
                {"x_ptr": pointer, "weight_ptr": pointer, "bias_ptr": pointer, "out_ptr": pointer, "x_stride": "i32",
                 "num_rows": "i32", "width": "i32", "eps": "fp32"},
                {"HAS_BIAS": True, "ROWS": rows, "BLOCK": block}, {"num_warps": warps},
            )  # fmt: skip
        yield (
            f"swiglu {short}", activation.swiglu_kernel,
            {"gate_up_ptr": pointer, "out_ptr": pointer, "row_stride": "i32", "width": "i32", "num_elements": "i32"},
            {"BLOCK": activation.BLOCK}, {},
        )  # fmt: skip
        for formula, number in activation.FORMULAS.items():
            yield (
                f"gelu {short} {formula}", activation.gelu_kernel,
                {"x_ptr": pointer, "out_ptr": pointer, "num_elements": "i32"},
                {"FORMULA": number, "BLOCK": activation.BLOCK}, {},
            )  # fmt: skip
        for heads, half in ((32, 64), (8, 128)):
            yield (
                f"rotate {short} {heads}x{2 * half}", rotary.rotate_kernel,
                {"x_ptr": pointer, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": pointer, "token_stride": "i32",
                 "head_stride": "i32", "num_heads": "i32", "half": "i32"},
                {"HEADS": heads, "HALF": half}, {"num_warps": max(1, min(8, heads * half // 256))},
            )  # fmt: skip
        yield (
            f"write_pages {short}", pages.write_pages_kernel,
            {"k_ptr": pointer, "v_ptr": pointer, "k_cache_ptr": pointer, "v_cache_ptr": pointer, "slots_ptr": "*i64",
             **dict.fromkeys(("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride"), "i32"),
             "num_heads": "i32", "head_dim": "i32"},
            {"HEADS": 4, "DIM": 128}, {"num_warps": 2},
        )  # fmt: skip
        yield from _attention(dtype, pointer)


def _attention(
    dtype: torch.dtype, pointer: str
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), pointer)
    strides = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")
    numbers = {f"{name}_stride": "i32" for name in (*strides, "table")}
    types = {
        **pointers, **dict.fromkeys(("out_lse_ptr", "partial_ptr", "lse_ptr"), "*fp32"), "tiles_ptr": "*i32",
        "table_ptr": "*i32", **numbers,
        "num_heads": "i32", "head_dim": "i32", "scale": "fp32", "softcap": "fp32", "split_keys": "i32",
    }  # fmt: skip
    cases = [
        (f"window {window}, head {dim}", group, dim, window, 16, 1, 0)
        for dim in (64, 128, 256)
        for group, window in ((7, 1), (7, 4), (4, 512))
    ]
    cases += [(f"segments, head {dim}", 1, dim, varlen_attention.MOST_ROWS, 0, 0, 0) for dim in (64, 80)]
    if dtype == torch.bfloat16:  # masks that cost registers beside the causal one
        cases += [(f"{name}, head 128", 4, 128, 512, 16, block, sliding) for name, block, sliding in MASKS]
    for name, group, dim, window, page, block, sliding in cases:
        size = torch.empty(0, dtype=dtype).element_size()
        if size == 4 and dim > 128:
            continue  # takes the torch path
        is_packed = page == 0
        shape = (
            varlen_attention.segment_shape(dim, window, size)
            if is_packed
            else attention.shape_for(group, dim, window, size)
        )
        for split in (False, True) if block and window < 16 else (False,):
            constants = {
                "GROUP": group, "ROWS": shape.rows, "KEYS": shape.keys, "DIM": max(16, triton.next_power_of_2(dim)),
                "PAGE": page, "BLOCK": block, "WINDOW": sliding, "SOFTCAP": False, "SPLIT": split, "LSE": False,
                "UPCAST": False,
            }  # fmt: skip
            options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
            label = f"attention {pointer[1:]} {name}{' split' if split else ''}"
            yield label, attention.attention_kernel, types, constants, options
    yield (
        f"merge {pointer[1:]}", attention.merge_kernel,
        {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": pointer, "out_lse_ptr": "*fp32", "tiles_ptr": "*i32",
         "num_heads": "i32", "head_dim": "i32", "num_splits": "i32"},
        {"GROUP": 4, "ROWS": 16, "DIM": 128, "LSE": True}, {"num_warps": 1},
    )  # fmt: skip


def compile_one(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], capability: int
) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of one variant. Raises what Triton raises."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {**_resources(compiled.asm["cubin"]), "shared": int(compiled.metadata.shared)}


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return {"registers": registers, "spilled": stack + local}


def main(arguments: list[str]) -> None:
    from tests.kernels import compile_serving  # imports what this module defines

    sets = {"transformer": variants, "serving": compile_serving.variants}
    chosen = [sets[name] for name in arguments if name in sets] or list(sets.values())
    capabilities = [int(text) for text in arguments if text not in sets] or [80, 90, 100]
    for name, kernel, types, constants, options in (variant for one in chosen for variant in one()):
        for capability in capabilities:
            if "float8" in name and capability < 89:
                continue  # the type does not exist there, and the op takes the torch path
            usage = compile_one(kernel, types, constants, options, capability)
            print(json.dumps({"kernel": name, "sm": capability, **usage}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
