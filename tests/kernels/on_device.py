"""The kernel tests on a GPU, unchanged: a pytest plugin that lets every Triton twin run there on tensors of the CPU.

    pytest -p tests.kernels.on_device tests/kernels

Each call copies the whole storage behind every tensor argument to the device (so strides, aliases and the poison
around a view survive), runs the launcher there, and copies back every storage that changed by a bit.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from kernels import dispatch


class Mirror:
    """Copies on `device` of the storages that one call touches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by address: (bytes here, bytes there)
        self._arguments: list[tuple[torch.Tensor, torch.Tensor]] = []

    def send(self, value: Any) -> Any:
        """`value` with every tensor in it (through sequences and dataclasses) replaced by its mirror."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.send(item) for item in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            tensors = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            tensors = {name: self._tensor(x) for name, x in tensors.items() if isinstance(x, torch.Tensor)}
            return dataclasses.replace(value, **tensors) if tensors else value
        return value

    def receive(self, value: Any) -> Any:
        """A result on the CPU: an argument handed back is the argument itself."""
        if isinstance(value, torch.Tensor):
            same = [here for here, there in self._arguments if there is value]
            return same[0] if same else value.cpu()
        if isinstance(value, (list, tuple)):
            return type(value)(self.receive(item) for item in value)
        if isinstance(value, dict):
            return {name: self.receive(item) for name, item in value.items()}
        return value

    def write_back(self) -> None:
        """Bring home what the call wrote."""
        for here, there in self._storages.values():
            back = there.cpu()
            if not torch.equal(here, back):
                here.copy_(back)

    def _tensor(self, here: torch.Tensor) -> torch.Tensor:
        if here.device == self.device and here.device.type != "cpu":
            return here
        address = here.untyped_storage().data_ptr()
        if address not in self._storages:
            raw = torch.empty(0, dtype=torch.uint8).set_(here.untyped_storage())
            self._storages[address] = raw, raw.to(self.device, copy=True)
        raw = self._storages[address][1]
        there = torch.empty(0, dtype=here.dtype, device=self.device)
        there.set_(raw.untyped_storage(), here.storage_offset(), here.shape, here.stride())
        self._arguments.append((here, there))
        return there


def on_device(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function` run on mirrors of its arguments."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        mirror = Mirror(device)
        sent = [mirror.send(arg) for arg in args], {name: mirror.send(arg) for name, arg in kwargs.items()}
        result = mirror.receive(function(*sent[0], **sent[1]))
        mirror.write_back()
        return result

    return call


def mirrored(module: ModuleType, device: torch.device) -> ModuleType:
    """A module like `module` whose launchers (not its kernels or classes) run on mirrors."""
    proxy = ModuleType(module.__name__)
    for name, value in vars(module).items():
        is_launcher = callable(value) and type(value).__name__ == "function" and not name.startswith("_")
        setattr(proxy, name, on_device(value, device) if is_launcher else value)
    return proxy


def pytest_configure() -> None:
    """Take over the dispatch for the whole run; a clear failure where there is no GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("the kernel tests were asked to run on a GPU, and torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())

    @functools.cache
    def load(module: str) -> ModuleType:
        loaded = importlib.import_module(f"kernels._triton.{module}")
        return loaded if module == "launch" else mirrored(loaded, device)

    dispatch._load = load  # type: ignore[assignment]
    dispatch.is_interpreted = lambda: True
