"""Every shipped Triton kernel compiles ahead of time for three generations of GPU, and none of them spills.

Each day for the middle one of them; the halves of the kernels are compiled side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.profiles import IS_SOAK

GENERATIONS = (80, 90, 100) if IS_SOAK else (90,)
AT_LEAST = {"transformer": 40, "serving": 30}
MAX_REGISTERS = 255
TIMEOUT_S = 560
pytestmark = pytest.mark.timeout(TIMEOUT_S + 40)


@pytest.mark.parametrize("capability", GENERATIONS)
def test_kernels_compile_without_spilling(capability: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "triton"),  # compiled anew, not remembered
    }
    processes = {
        kernels: subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.compile_kernels", kernels, str(capability)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for kernels in AT_LEAST
    }
    try:
        for kernels, process in processes.items():
            told, complaints = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, complaints[-2000:]
            _check([json.loads(line) for line in told.splitlines()], AT_LEAST[kernels])
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def _check(usages: list[dict[str, int]], at_least: int) -> None:
    print(*usages, sep="\n")
    assert len(usages) > at_least
    assert not [usage for usage in usages if usage["spilled"]]
    assert all(0 < usage["registers"] <= MAX_REGISTERS for usage in usages)
