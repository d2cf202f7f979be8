"""`python -m benchmarks.gpu`: on a machine with a GPU, run the kernel tests there, then measure every kernel.

Prints per kernel microseconds, what it moves or computes per second, the share of the measured ceiling (of copying, or
of matrix products), and how many times as fast it is as the best peer. Ends within nine minutes. Exit status: 0 all
went well, 1 a test or a case failed, 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import device_tests, memory_cases, model_cases, step_cases
from benchmarks.gpu.case import Case, Setting
from benchmarks.gpu.measure import Ceilings, ceilings, microseconds
from benchmarks.report import machine, versions, write_json
from kernels import dispatch

NO_GPU = 3
TESTS_S, TOTAL_S = 240.0, 470.0  # the rest of nine minutes is for starting, the last case, and writing
UNITS = {"copy": ("GB/s", 1e9), "matmul": ("TFLOP/s", 1e12)}
HEADINGS = ("kernel", "us", "rate", "of ceiling", "best peer", "peer us", "ratio")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured case: `us`, work per second, share of the ceiling, and peers' microseconds; or the error."""

    name: str
    kind: str
    us: float = math.nan
    rate: float = math.nan
    share: float = math.nan
    peers_us: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def best_peer(self) -> tuple[str, float] | None:
        return min(self.peers_us.items(), key=lambda item: item[1]) if self.peers_us else None

    def content(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {name: None if value != value else value for name, value in dataclasses.asdict(self).items()}

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        if "call" in self.errors:
            return (self.name, f"failed: {self.errors['call']}", *[""] * 5)
        unit, scale = UNITS[self.kind]
        shown = (self.name, f"{self.us:.1f}", f"{self.rate / scale:.1f} {unit}", f"{100 * self.share:.0f} %")
        if self.best_peer is None:
            return (*shown, "-", "-", "-")
        peer, peer_us = self.best_peer
        return (*shown, peer, f"{peer_us:.1f}", f"{peer_us / self.us:.2f}")


GROUPS: tuple[Callable[[Setting], Iterator[Case]], ...] = (
    *memory_cases.GROUPS,
    *model_cases.GROUPS,
    *step_cases.GROUPS,
)


def all_cases(setting: Setting, groups: Sequence[Callable[[Setting], Iterator[Case]]] = GROUPS) -> Iterator[Case | Row]:
    """Every case, built one after the other; a row with the error in place of what a group could not build."""
    for group in groups:
        try:
            yield from group(setting)
        except Exception as error:  # the tables of the others are worth having
            name = f"rest of {group.__name__.strip('_')}"
            yield Row(name=name, kind="copy", errors={"call": f"not built: {_one_line(error)}"})


def measure(case: Case, setting: Setting, ceiling: Ceilings, *, with_peers: bool = True) -> Row:
    """Time a case and its peers. What fails is named in the row, and the others go on."""
    errors: dict[str, str] = {}
    try:
        with dispatch.forced("triton"):
            us = microseconds(case.call, setting.device)
    except Exception as error:  # a kernel that fails must not take the table with it
        return Row(name=case.name, kind=case.kind, errors={"call": _one_line(error)})
    peers_us = {}
    for name, build in case.peers.items() if with_peers else ():
        try:
            peers_us[name] = microseconds(build(), setting.device)
        except Exception as error:
            errors[name] = _one_line(error)
    rate = case.work / us * 1e6
    share = rate / ceiling.of(case.kind)
    return Row(name=case.name, kind=case.kind, us=us, rate=rate, share=share, peers_us=peers_us, errors=errors)


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns under HEADINGS, the first to the left, the others to the right."""
    lines = [HEADINGS, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(line[i].rjust(width) if i else line[i].ljust(width) for i, width in enumerate(widths))
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"), help="where results go")
    parser.add_argument("--only", default="", help="measure only kernels whose name contains this")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests first")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no GPU here; nothing was run (CPU: benchmarks.bench_kernels)",
            file=sys.stderr,
        )
        return NO_GPU
    start = time.monotonic()
    results = [] if options.no_tests else _run_tests()
    setting = Setting(device=torch.device("cuda", torch.cuda.current_device()))
    rows, left_out = _measure_all(setting, options.only, start + TOTAL_S)
    content: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(["torch", "triton"]),
        "seconds": round(time.monotonic() - start, 1),
        "tests": [dataclasses.asdict(result) for result in results],
        **rows,
        "left_out": left_out,
    }
    write_json(options.json, content)
    print(f"{content['seconds']} s; written to {options.json}")
    has_failed = any(result.outcome != "passed" for result in results)
    return int(has_failed or any("call" in row["errors"] for row in rows["kernels"]))


def _run_tests() -> list[device_tests.FileResult]:
    found = [(path.name, device_tests.command(path)) for path in device_tests.files()]
    print(f"kernel tests on the GPU: {len(found)} files, at most {TESTS_S:.0f} s", flush=True)
    results = device_tests.run(found, TESTS_S)
    for result in results:
        print(f"  {result.name:28}{result.outcome:14}{result.summary}")
        if result.tail:
            print(result.tail)
    return results


def _measure_all(setting: Setting, only: str, deadline: float) -> tuple[dict[str, Any], list[str]]:
    ceiling = ceilings(setting)
    print(f"ceilings: copy {ceiling.copy / 1e9:.0f} GB/s, matmul {ceiling.matmul / 1e12:.0f} TFLOP/s ({setting.dtype})")
    rows: list[Row] = []
    left_out: list[str] = []
    for case in all_cases(setting):
        if only not in case.name:
            continue
        if time.monotonic() > deadline:
            left_out.append(case.name)
            continue
        rows.append(case if isinstance(case, Row) else measure(case, setting, ceiling))
        print("  ".join(rows[-1].cells()), flush=True)
    print("\n" + table([row.cells() for row in rows]))
    if left_out:
        print(f"left out for want of time: {', '.join(left_out)}")
    return {"ceilings": dataclasses.asdict(ceiling), "kernels": [row.content() for row in rows]}, left_out


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]


if __name__ == "__main__":
    sys.exit(main())
