"""Every Triton kernel with each of its numbers equal to 1, as far as its own language goes; prints what is refused.

    python -m tests.kernels.compile_ones

A launch makes a constant of every argument that is 1 (a vocabulary of one id, one head, one row), which has not all the
methods that a number has; the interpreter passes a number. Needs no GPU; runs without TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from tests.kernels import compile_kernels, compile_serving

TARGET = GPUTarget("cuda", 90, 32)


def translate(kernel: Any, types: dict[str, str], constants: dict[str, Any], ones: Sequence[str]) -> None:
    """To Triton's first intermediate language, with `ones` being 1. Raises what Triton raises."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in ones else types.get(name, "constexpr") for name in names}
    constant = {(names.index(name),): value for name, value in {**constants, **dict.fromkeys(ones, 1)}.items()}
    backend, context = make_backend(TARGET), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({})
    source = ASTSource(kernel, signature, constant, {})
    source.make_ir(TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def refused() -> Iterator[str]:
    """A line for each kernel and number that cannot be 1; of variants that differ in sizes alone one is tried."""
    seen = set()
    for name, kernel, types, constants, _ in itertools.chain(compile_kernels.variants(), compile_serving.variants()):
        flags = {key: value for key, value in constants.items() if isinstance(value, bool)}
        if (key := (kernel.__name__, *sorted(flags.items()))) in seen:
            continue
        seen.add(key)
        numbers = [argument for argument in kernel.arg_names if types.get(argument) == "i32"]
        for ones in [[number] for number in numbers] + [numbers]:
            try:
                translate(kernel, types, constants, ones)
            except Exception as error:  # Triton's own kinds of errors, and Python's inside them
                yield f"{name} with {' = '.join(ones)} = 1: {error.__cause__ or error}".replace("\n", " ")
    print(f"{len(seen)} kernels", flush=True)


if __name__ == "__main__":
    for line in refused():
        print(line, flush=True)
