"""Microseconds of a call, and the ceilings of a device: how fast it copies memory and multiplies matrices.

Calls are timed one by one with device events, the second-level cache overwritten before each; the median counts. That
takes the device longer than the host takes for a call, so that its launches lie ready and the host's time is not part
of the figure. On the CPU (tests of the harness) a clock stands in for the events.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch

from benchmarks.gpu.case import Call, Kind, Setting

WARMUP_CALLS = 3
MIN_CALLS, MAX_CALLS = 10, 200
BUDGET_US = 150_000.0  # of timed calls
FLUSH_BYTES = 1 << 30  # some 0.4 ms on an H100


def microseconds(call: Call, device: torch.device, *, max_calls: int = MAX_CALLS) -> float:
    """Median time of one call."""
    for _ in range(WARMUP_CALLS):
        call()
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    first = _timed(call, device, flush)
    count = int(max(MIN_CALLS, min(max_calls, BUDGET_US / max(first, 1.0))))
    return statistics.median(_timed(call, device, flush) for _ in range(min(count, max_calls)))


def _timed(call: Call, device: torch.device, flush: torch.Tensor) -> float:
    flush.zero_()
    if device.type != "cuda":
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Bytes per second read plus written by a large copy; floating-point operations per second of a large product."""

    copy: float
    matmul: float

    def of(self, kind: Kind) -> float:
        return self.copy if kind == "copy" else self.matmul


def ceilings(setting: Setting) -> Ceilings:
    """Measured, not read from a data sheet."""
    source = setting.normal(setting.size(1 << 29, 1 << 10))
    target = torch.empty_like(source)
    copy_us = microseconds(lambda: target.copy_(source), setting.device)
    width = setting.size(8192, 32)
    left, right = setting.normal(width, width), setting.normal(width, width)
    matmul_us = microseconds(lambda: left @ right, setting.device)
    return Ceilings(
        copy=2 * source.numel() * source.element_size() / copy_us * 1e6, matmul=2.0 * width**3 / matmul_us * 1e6
    )
