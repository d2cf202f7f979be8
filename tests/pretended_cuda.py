"""A CUDA device that is not there: its tensors live in main memory, and everything else is as strict as on a real one.

Inside `pretended_cuda()` (one thread) `torch.device("cuda:1")` holds tensors. A call that mixes them with those of the
CPU raises, as CUDA's does; a Triton kernel (interpreted) that is handed a tensor of the CPU raises, where a real one
would read a wild pointer. What the host reads back, and what makes it wait for sizes, is counted by name in
`PretendedCuda.host_reads`: each of these drains a real device.

A CUDA graph records the calls that are made while it is captured, with the very tensors they were made on; a replay
makes them again, and writes what they return where the first ones' results lie. What the host says in between is not
heard, as on a real device. Copies from the host and reads by it are refused while capturing.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 1)  # not the one that is current at first
CPU = torch.device("cpu")
PROPERTIES = SimpleNamespace(multi_processor_count=4, total_memory=1 << 30)
PLACES = {"device", "is_cuda", "is_cpu", "is_meta", "get_device"}  # what is asked of the tensor itself
READS = {
    "tolist",
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
    "equal",
    "allclose",
    "is_nonzero",
}
SIZES = {"nonzero", "masked_select", "unique", "unique_consecutive", "bincount", "argwhere"}
PROPERTIES_OF_SHAPE = {"dim", "size", "stride", "numel", "is_contiguous", "element_size", "storage_offset"}
MIXING = {"to", "copy_", "type", "__getitem__", "__setitem__", "index_put_", "index_put", "cpu", "cuda", "type_as"}


class DeviceTensor(torch.Tensor):
    """Looks like a tensor of the device; `inner` holds the numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on {DEVICE} in a way that pretended_cuda() does not see")


def inner(value: Any) -> Any:
    """What a tensor of the device holds; anything else as it is."""
    return value.inner if isinstance(value, DeviceTensor) else value


class PretendedCuda(TorchFunctionMode):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.host_reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.capturing: list[Callable[[], None]] | None = None
        self.current = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = _name(func)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_here = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        target = _target(name, args, kwargs)
        kwargs.pop("pin_memory", None)
        if name in PLACES or not (is_here or target == DEVICE):
            return args[0] if name == "pin_memory" else func(*args, **kwargs)
        if name == "numpy":
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")
        self._look(name, args, tensors)
        lands_here = (DEVICE if target is None else target) == DEVICE
        if name == "copy_":
            lands_here = isinstance(args[0], DeviceTensor)
        if is_here and (not lands_here or name in READS | SIZES):
            self.host_reads[name] += 1
        if lands_here and any(tensor.device == CPU and tensor.dim() for tensor in tensors):
            self.uploads[name] += 1
        if self.capturing is not None and (self.host_reads or self.uploads):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        args, kwargs = tree_map(_to_cpu, (args, kwargs))
        result = func(*args, **kwargs)
        if name not in PROPERTIES_OF_SHAPE:
            self._record(partial(_again, func, args, kwargs, result))
        return self._wrapped(result, tensors, lands_here)

    def launch(self, launch: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A Triton kernel's."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor):
                raise RuntimeError(f"a kernel was handed a tensor of the CPU: {tuple(value.shape)} {value.dtype}")
        call = partial(launch, executor, *map(inner, args), **{name: inner(value) for name, value in kwargs.items()})
        if self.current != DEVICE.index:
            raise RuntimeError(f"a kernel on tensors of {DEVICE} was launched on device {self.current}")
        self._record(call)
        return call()

    def _record(self, call: Callable[[], Any]) -> None:
        """Of a graph, where one is captured: on the device that is current, as its stream is."""
        if self.capturing is not None:
            if self.current != DEVICE.index:
                raise RuntimeError(f"the stream of device {self.current} is captured, and not that of {DEVICE}")
            self.capturing.append(call)

    @contextlib.contextmanager
    def on(self, device: torch.device | int) -> Iterator[None]:
        """`torch.cuda.device`."""
        before, self.current = self.current, device if isinstance(device, int) else device.index or 0
        try:
            yield
        finally:
            self.current = before

    def _wrapped(self, result: Any, tensors: list[torch.Tensor], lands_here: bool) -> Any:
        given = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
        strangers = {id(tensor) for tensor in tensors}

        def outer(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if not lands_here:  # a copy: what moves between memories shares none
                return value.clone() if id(value) in given else value
            if id(value) in given:
                return given[id(value)]
            return DeviceTensor(value.clone() if id(value) in strangers else value)

        return tree_map(outer, result)

    def _look(self, name: str, args: Any, tensors: list[torch.Tensor]) -> None:
        """CUDA takes numbers of the CPU (no dimensions), copies, and indices of the CPU; nothing else from there."""
        is_mask = name in ("__getitem__", "__setitem__", "index_put_") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        is_repeat = name == "repeat_interleave" and any(isinstance(leaf, torch.Tensor) for leaf in args[1:])
        if is_mask or is_repeat or (name == "where" and len(args) == 1):
            self.host_reads[f"{name} by values"] += 1
        strangers = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim()]
        if strangers and name not in MIXING:
            shapes = [tuple(tensor.shape) for tensor in strangers]
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found {DEVICE} and cpu {shapes}"
            )


def _name(func: Any) -> str:
    """Of a property `__get__` does not say which; its descriptor does."""
    name: str = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def _target(name: str, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call asks for, if any."""
    if name in ("cpu", "cuda"):
        return CPU if name == "cpu" else DEVICE
    asked = kwargs.get("device")
    if name == "to" and asked is None:
        asked = next((a.device if isinstance(a, torch.Tensor) else a for a in args[1:2] if not _is_dtype(a)), None)
    return None if asked is None else torch.device(asked)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) or value == str(DEVICE):
        return CPU
    return inner(value)


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """A recorded call: its results land where the first ones lie, unless they are views of what it was called on."""
    for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, torch.Tensor) and new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
            old.copy_(new)


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextlib.contextmanager
def _capture(mode: PretendedCuda, graph: Graph, **_: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    before, mode.host_reads, mode.uploads = (mode.host_reads, mode.uploads), Counter(), Counter()
    mode.capturing = graph.calls
    try:
        yield
    finally:
        mode.capturing = None
        mode.host_reads, mode.uploads = before


@contextlib.contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """See the module. Needs TRITON_INTERPRET=1."""
    from triton.runtime.interpreter import GridExecutor

    mode = PretendedCuda()
    answers = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "device": mode.on,
        "current_device": lambda: mode.current,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (1 << 30, 1 << 30),
        "synchronize": lambda device=None: None,
        "CUDAGraph": Graph,
        "graph": partial(_capture, mode),
        "graph_pool_handle": lambda: (0, 0),
        "Event": mock.MagicMock,
    }
    launch = GridExecutor.__call__
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **answers))
        checked = lambda executor, *args, **kwargs: mode.launch(launch, executor, *args, **kwargs)  # noqa: E731
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", checked))
        yield stack.enter_context(mode)
