"""Which path an op takes: its Triton twin (`kernels/_triton/`), its C twin (`kernels/_native/`) or its torch path.

CUDA tensors of float16, bfloat16 or float32 take the Triton twin where Triton is installed. On the CPU tensors of
float32 or bfloat16 (of some ops small ones only) take the C twin of ops that have one, where a C compiler is installed.
Everything else takes torch, inputs whose gradient is recorded too: the twins have none.
`forced` overrides that for tests and comparisons. Importing this package never imports Triton, and compiles nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FunctionType, ModuleType
from typing import Any, Literal, TypeAlias

import torch

from kernels.errors import NativeUnavailable, TritonUnavailable
from kernels.invariance import is_batch_invariant

Path: TypeAlias = Literal["torch", "triton", "native"]

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
_NATIVE_FLOATS = frozenset({torch.bfloat16, torch.float32})
NATIVE_NUMBERS = 1 << 17  # of a tensor on the CPU: larger ones keep both torch's threads busy, and calls cost little
ANY_SIZE = 1 << 62  # for ops whose C twin shares its work out among torch's threads
_forced: ContextVar[Path | None] = ContextVar("kernel_path", default=None)


@contextlib.contextmanager
def forced(path: Path) -> Iterator[None]:
    """Every op called inside takes `path`, an op without a C twin torch's instead of "native". Raises TritonUnavailable
    or NativeUnavailable (at the first op) where that cannot be."""
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def twin(module: str, tensor: torch.Tensor) -> ModuleType | None:
    """`kernels._triton.<module>` when an op on `tensor` is to take the Triton path, else None.

    Raises TritonUnavailable when that path is forced and cannot be taken.
    """
    path = _forced.get()
    if path is None:
        takes = tensor.is_cuda and tensor.dtype in _FLOATS and has_triton() and not _is_recorded(tensor)
        return _launching_beside(tensor, module) if takes else None
    if path != "triton":
        return None
    if not has_triton():
        raise TritonUnavailable("the Triton path was asked for and Triton is not installed: pip install triton")
    if tensor.dtype not in _FLOATS:
        raise TritonUnavailable(f"the Triton path takes float16, bfloat16 and float32, not {tensor.dtype}")
    if not tensor.is_cuda and not is_interpreted():
        raise TritonUnavailable(
            f"the Triton path was asked for on {tensor.device}: it needs a CUDA device, or TRITON_INTERPRET=1 set "
            "before the first import"
        )
    return _launching_beside(tensor, module)


def fused(module: str, tensor: torch.Tensor, most: int = NATIVE_NUMBERS) -> ModuleType | None:
    """`twin`, or `kernels._native.<module>` when an op on `tensor` (of at most `most` numbers) is to take the C path.

    Raises TritonUnavailable or NativeUnavailable when a path is forced and cannot be taken.
    """
    return twin(module, tensor) or native(module, tensor, most)


def native(module: str, tensor: torch.Tensor, most: int = NATIVE_NUMBERS) -> ModuleType | None:
    """`kernels._native.<module>` when an op on `tensor` (of at most `most` numbers, or where ops are batch-invariant of
    any) is to take the C path, else None.

    Raises NativeUnavailable when that path is forced and cannot be taken; other dtypes take torch's even then.
    """
    path = _forced.get()
    if path is None:
        is_small = tensor.numel() <= most or is_batch_invariant()
        takes = tensor.dtype in _NATIVE_FLOATS and is_small
    else:
        takes = path == "native" and tensor.dtype in _NATIVE_FLOATS
    if not takes or not tensor.is_cpu or _is_recorded(tensor):
        return None
    if has_native():
        return _load_native(module)
    if path == "native":
        raise NativeUnavailable("the C path was asked for and no C compiler could make it: install gcc or clang")
    return None


def attention_twin(module: str, q: torch.Tensor) -> ModuleType | None:
    """`twin` for queries [..., D] whose head fits the registers of a tile; wider heads take the torch path."""
    widest = 128 if q.dtype == torch.float32 else 256
    return twin(module, q) if q.shape[-1] <= widest else None


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed (not whether a driver is there)."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_native() -> bool:
    """Whether the C twins can be had; the first call compiles them unless that was done before."""
    return importlib.import_module("kernels._native.library").library() is not None


def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return has_triton() and bool(_load("launch").IS_INTERPRETED)


def deciding(x: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
    """The tensor by which an op chooses its path: x, or a weight whose gradient is recorded."""
    if torch.is_grad_enabled():
        return next((weight for weight in weights if weight is not None and weight.requires_grad), x)
    return x


def _is_recorded(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _launching_beside(tensor: torch.Tensor, module: str) -> ModuleType:
    """`kernels._triton.<module>`: Triton launches on the current device, which must be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _load(module)
    return _launching_on(tensor.device.index, module)


@functools.cache
def _launching_on(device: int, module: str) -> ModuleType:
    """`kernels._triton.<module>` with CUDA device `device` as the current one inside its launchers."""

    def moved(launcher: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(launcher)
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device(device):
                return launcher(*args, **kwargs)

        return call

    loaded = _load(module)
    proxy = ModuleType(loaded.__name__)
    for name, value in vars(loaded).items():
        setattr(proxy, name, moved(value) if isinstance(value, FunctionType) else value)
    return proxy


@functools.cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(f"kernels._triton.{module}")


@functools.cache
def _load_native(module: str) -> ModuleType:
    return importlib.import_module(f"kernels._native.{module}")
