"""Which path an op takes, and what happens where the Triton path cannot be taken."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch
from kernels.errors import TritonUnavailable
from kernels.linear import linear
from kernels.norm import add_rms_norm, rms_norm, rms_norm_heads

ROWS, WEIGHT = torch.ones(2, 8), torch.ones(8)

WITHOUT_TRITON = """
import importlib.abc, importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
import importlib, pkgutil, kernels, kernels.norm
modules = [module.name for module in pkgutil.iter_modules(kernels.__path__) if not module.ispkg]
assert len(modules) > 10
for name in modules:
    importlib.import_module(f"kernels.{name}")
from kernels import dispatch
from kernels.errors import TritonUnavailable
rows, weight = torch.ones(2, 8), torch.ones(8)
kernels.norm.rms_norm(rows, weight, 1e-6)
try:
    with dispatch.forced("triton"):
        kernels.norm.rms_norm(rows, weight, 1e-6)
except TritonUnavailable as error:
    print(error)
"""


def _run(source: str, **environment: str) -> str:
    """Standard output of a fresh interpreter without TRITON_INTERPRET."""
    result = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=True, env={**environment}
    )
    return result.stdout


def test_tensors_on_the_cpu_take_the_torch_path() -> None:
    assert dispatch.twin("norm", ROWS) is None
    with dispatch.forced("torch"):
        assert dispatch.twin("norm", ROWS) is None
    with dispatch.forced("triton"):
        assert dispatch.twin("norm", ROWS) is not None
        with dispatch.forced("torch"):
            assert dispatch.twin("norm", ROWS) is None
    assert dispatch.twin("norm", ROWS) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_weights_are_not_lost(dtype: torch.dtype) -> None:
    """The C twins, which small rows take, record nothing."""
    x, weight = torch.randn(2, 8).to(dtype), torch.randn(8, 8).to(dtype).requires_grad_()
    for result in (
        rms_norm(x, weight[0], 1e-6),
        rms_norm_heads(x[:, None].expand(2, 8, 8), weight, 1e-6),
        add_rms_norm(x, x.clone(), weight[0], 1e-6)[0],
        linear(x, weight),
    ):
        (gradient,) = torch.autograd.grad(result.float().square().sum(), weight)
        assert bool(gradient.any())


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, wherever its pointers lead."""
    seen: list[object] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        seen.append(index)
        yield
        seen.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    elsewhere, here = dispatch._launching_on(3, "norm"), dispatch._load("norm")
    assert elsewhere.ELEMENTS == here.ELEMENTS
    assert torch.equal(elsewhere.rms_norm(2 * ROWS, WEIGHT, 1e-6, False), here.rms_norm(2 * ROWS, WEIGHT, 1e-6, False))
    assert seen == [3, "left"]


def test_other_dtypes_are_refused_on_the_triton_path_only() -> None:
    wide = ROWS.double()
    assert rms_norm(wide, WEIGHT.double(), 1e-6).dtype == torch.float64
    with dispatch.forced("triton"), pytest.raises(TritonUnavailable, match=r"not torch\.float64"):
        rms_norm(wide, WEIGHT.double(), 1e-6)


def test_without_triton_everything_imports_and_asking_for_it_is_a_clear_error() -> None:
    assert "Triton is not installed" in _run(WITHOUT_TRITON)


def test_importing_the_ops_never_imports_triton() -> None:
    source = (
        "import sys, importlib, pkgutil, kernels\n"
        "for module in pkgutil.iter_modules(kernels.__path__):\n"
        "    importlib.import_module(f'kernels.{module.name}')\n"
        "print([name for name in sys.modules if name.startswith('kernels._triton.')])"
    )
    assert _run(source).strip() == "[]"


def test_without_a_driver_or_the_interpreter_the_triton_path_is_refused() -> None:
    source = (
        "import torch\nfrom kernels import dispatch, norm\nfrom kernels.errors import TritonUnavailable\n"
        "try:\n    with dispatch.forced('triton'):\n        norm.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)\n"
        "except TritonUnavailable as error:\n    print(error)\n"
    )
    assert "needs a CUDA device, or TRITON_INTERPRET=1" in _run(source)
