"""The pretended device is as strict as the one it stands for."""

from __future__ import annotations

import pytest
import torch

from kernels.norm import rms_norm
from tests.pretended_cuda import DEVICE, DeviceTensor, PretendedCuda, pretended_cuda


def test_numbers_are_those_of_the_cpu_and_stay_on_the_device() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    with pretended_cuda():
        there = x.to(DEVICE)
        assert there.is_cuda
        assert there.device == DEVICE
        there[:, 1:].mul_(2)  # of a copy, through a view
        assert torch.zeros(2, device="cuda:1").device == DEVICE
        assert there.new_zeros(2).is_cuda
        assert torch.cat([there, there]).sum(0).is_cuda
        home = there.cpu()
    assert not isinstance(home, DeviceTensor)
    assert torch.equal(home[:, 0], x[:, 0])
    assert torch.equal(home[:, 1:], 2 * x[:, 1:])


def test_memories_are_not_mixed() -> None:
    with pretended_cuda():
        there = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([torch.ones(3), there])
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there + torch.tensor(1.0)).sum().item() == 6.0  # a number
        assert there[torch.tensor([0, 2])].shape == (2,)  # indices


def test_a_kernel_is_handed_nothing_of_the_cpu() -> None:
    weight = torch.ones(8)
    with pretended_cuda():
        x = torch.ones(2, 8, device=DEVICE)
        assert rms_norm(x, weight.to(DEVICE), 1e-9).cpu().round(decimals=4).tolist() == [[1.0] * 8] * 2
        with pytest.raises(RuntimeError, match="tensor of the CPU"):
            rms_norm(x, weight, 1e-9)


@pytest.mark.parametrize("read", [lambda x: x.tolist(), lambda x: x.sum().item(), lambda x: bool(x.any()),
                                  lambda x: x.cpu(), lambda x: x.nonzero(), lambda x: x[x > 0]])  # fmt: skip
def test_waiting_for_the_device_is_counted_and_refused_while_capturing(read) -> None:
    with pretended_cuda() as cuda:
        x = torch.ones(3, device=DEVICE)
        cuda.host_reads.clear()
        read(x)
        assert cuda.host_reads.total() == 1, cuda.host_reads
        refused = pytest.raises(RuntimeError, match="capturing")
        with torch.cuda.device(DEVICE), refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            read(x)


def test_a_graph_repeats_its_calls_where_they_were_made() -> None:
    with pretended_cuda():
        x, weight, factor = torch.ones(2, 4, device=DEVICE), torch.ones(4, device=DEVICE), 2.0
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="stream of device 0"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.mul(factor)
        with torch.cuda.device(DEVICE), torch.cuda.graph(graph):
            scaled = x.mul(factor)
            scaled[0] = 1.0
            out = rms_norm(scaled.view(4, 2).view(2, 4), weight, 1e-9)
        factor = 3.0  # which it does not hear of
        x.copy_(torch.tensor([[0.0] * 4, [0.0, 0.0, 0.0, 6.0]]))
        graph.replay()
        assert scaled.tolist() == [[1.0] * 4, [0.0, 0.0, 0.0, 12.0]]
        assert out.cpu().round(decimals=4).tolist() == [[1.0] * 4, [0.0, 0.0, 0.0, 2.0]]
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.copy_(torch.zeros(2, 4))
    assert factor == 3.0


def test_outside_it_nothing_can_be_done_with_its_tensors() -> None:
    with pretended_cuda() as cuda:
        assert isinstance(cuda, PretendedCuda)
        x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError):
        x + 1
    assert not torch.cuda.is_available()
