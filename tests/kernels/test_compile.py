"""Every shipped Triton kernel compiles ahead of time for three generations of GPU, and none of them spills; and with
every number that it gets equal to 1, of which a launch makes a constant."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

GENERATIONS = (80, 90, 100)
MAX_REGISTERS = 255


@pytest.mark.parametrize(("kernels", "at_least"), [("transformer", 40), ("serving", 30)])
@pytest.mark.parametrize("capability", GENERATIONS)
def test_kernels_compile_without_spilling(
    capability: int, kernels: str, at_least: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("triton")
    result = _run(tmp_path_factory, "tests.kernels.compile_kernels", kernels, str(capability))
    assert result.returncode == 0, result.stderr[-2000:]
    usages = [json.loads(line) for line in result.stdout.splitlines()]
    print(*usages, sep="\n")
    assert len(usages) > at_least
    assert not [usage for usage in usages if usage["spilled"]]
    assert all(0 < usage["registers"] <= MAX_REGISTERS for usage in usages)


def test_any_number_of_a_launch_may_be_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("triton")
    result = _run(tmp_path_factory, "tests.kernels.compile_ones")
    assert result.returncode == 0, result.stderr[-2000:]
    *refused, count = result.stdout.splitlines()
    assert not refused
    assert int(count.split()[0]) > 40


def _run(tmp_path_factory: pytest.TempPathFactory, *module: str) -> subprocess.CompletedProcess[str]:
    """A module in a process of its own, without the interpreter; what it compiles is compiled anew."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "triton"),
    }
    return subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True, timeout=280, env=environment)
