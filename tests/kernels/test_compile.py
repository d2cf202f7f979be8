"""Every shipped Triton kernel compiles ahead of time for three generations of GPU, and none of them spills."""

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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "triton"),  # compiled anew, not remembered
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_kernels", kernels, str(capability)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    usages = [json.loads(line) for line in result.stdout.splitlines()]
    print(*usages, sep="\n")
    assert len(usages) > at_least
    assert not [usage for usage in usages if usage["spilled"]]
    assert all(0 < usage["registers"] <= MAX_REGISTERS for usage in usages)
