"""Every shipped Triton kernel compiles ahead of time for three generations of GPU, and none of them spills; and with
every number that it gets equal to 1, of which a launch makes a constant. Compilers run side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

GENERATIONS = (80, 90, 100)
AT_LEAST = {"transformer": 40, "serving": 30}
MAX_REGISTERS = 255
TIMEOUT_S = 560
pytestmark = pytest.mark.timeout(TIMEOUT_S + 40)


@pytest.mark.parametrize("capability", GENERATIONS)
def test_kernels_compile_without_spilling(capability: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("triton")
    runs = [("tests.kernels.compile_kernels", kernels, str(capability)) for kernels in AT_LEAST]
    for told, at_least in zip(_run(tmp_path_factory, *runs), AT_LEAST.values(), strict=True):
        usages = [json.loads(line) for line in told]
        print(*usages, sep="\n")
        assert len(usages) > at_least
        assert not [usage for usage in usages if usage["spilled"]]
        assert all(0 < usage["registers"] <= MAX_REGISTERS for usage in usages)


def test_any_number_of_a_launch_may_be_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("triton")
    ((*refused, count),) = _run(tmp_path_factory, ("tests.kernels.compile_ones",))
    assert not refused
    assert int(count.split()[0]) > 40


def _run(tmp_path_factory: pytest.TempPathFactory, *modules: tuple[str, ...]) -> list[list[str]]:
    """Lines of each module, all in processes of their own, without the interpreter; what they compile is compiled
    anew."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "triton"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *module],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for module in modules
    ]
    try:
        lines = []
        for process in processes:
            told, complaints = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, complaints[-2000:]
            lines.append(told.splitlines())
        return lines
    finally:
        for process in processes:
            process.kill()
            process.communicate()
