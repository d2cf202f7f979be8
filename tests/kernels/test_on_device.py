"""The plugin that runs kernel tests on a GPU, tried with the CPU as its device."""

from __future__ import annotations

import math

import torch

from kernels.selective_scan import ScanWeights
from tests.kernels.on_device import Mirror, mirrored, on_device

CPU = torch.device("cpu")


def test_arguments_are_mirrored_with_their_surroundings_and_writes_come_home() -> None:
    memory = torch.full((4, 6), math.nan)
    view, other = memory[1:3, 2:5], memory[:, 5]
    view.zero_()

    def write(target: torch.Tensor, alias: torch.Tensor, untouched: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert target.data_ptr() != view.data_ptr()
        assert alias.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
        target += 1
        return target, alias[:2].clone()

    row = torch.ones(1, 3).expand(5, 3)  # cannot be written as a tensor, and is not
    returned, copied = on_device(write, CPU)(view, other, row)
    assert returned is view
    assert view.tolist() == [[1.0] * 3] * 2
    assert bool(memory[0].isnan().all())
    assert bool(copied.isnan().all())


def test_tensors_inside_dataclasses_are_mirrored() -> None:
    weights = ScanWeights(a=torch.zeros(2, 3), skip=torch.ones(2))
    sent = Mirror(CPU).send(weights)
    assert torch.equal(sent.skip, weights.skip)
    assert sent.skip.data_ptr() != weights.skip.data_ptr()
    assert sent.dt_bias is None


def test_launchers_are_wrapped_and_constants_are_not() -> None:
    from kernels._triton import norm

    proxy = mirrored(norm, CPU)
    assert proxy.ELEMENTS == norm.ELEMENTS
    assert proxy.rms_norm is not norm.rms_norm
    x = torch.randn(3, 8)
    assert torch.equal(proxy.rms_norm(x, None, 1e-6, False), norm.rms_norm(x, None, 1e-6, False))
