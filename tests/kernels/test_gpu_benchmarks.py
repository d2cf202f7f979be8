"""The GPU benchmark without a GPU: every case runs on both paths, and the command says what it lacks."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import device_tests, step_cases
from benchmarks.gpu.case import Case, Setting
from benchmarks.gpu.measure import Ceilings, ceilings, microseconds
from benchmarks.report import versions
from kernels.dispatch import Path, forced
from tests.kernels.paths import PATHS
from tests.pretended_cuda import DEVICE, pretended_cuda

TINY = Setting(device=torch.device("cpu"), is_tiny=True, dtype=torch.float16)


@pytest.mark.parametrize("path", PATHS)
def test_every_case_and_every_peer_that_is_just_called_runs(path: Path) -> None:
    names = []
    for case in command.all_cases(TINY):
        assert isinstance(case, Case), case
        with forced(path):
            case.call()
        for name, build in case.peers.items():
            if name != "compile":
                build()()
        assert case.work > 0
        names.append(case.name)
    assert len(names) > 45


def test_recorded_decode_steps_give_the_logits_of_those_launched_one_by_one() -> None:
    with pretended_cuda():
        cases = list(command.all_cases(Setting(device=DEVICE, is_tiny=True, dtype=torch.float32), step_cases.GROUPS))
        for case in cases:
            assert isinstance(case, Case), case
            for call in (case.call, case.peers["one by one"]()):
                assert call().logits.shape[1] == 96  # type: ignore[attr-defined]
    assert [case.name for case in cases] == ["decode step 1 x 5", "decode step 3 x 5", "decode step 3 x 5"]


def test_times_and_ceilings_are_positive_and_calls_are_counted() -> None:
    calls = []
    assert microseconds(lambda: calls.append(1), TINY.device, max_calls=10) > 0
    assert len(calls) > 10
    found = ceilings(TINY)
    assert found.of("copy") == found.copy > 0
    assert found.of("matmul") == found.matmul > 0


def test_a_row_has_rates_shares_and_the_best_peer_and_names_what_failed() -> None:
    case = next(case for case in command.all_cases(TINY) if isinstance(case, Case) and case.name == "rms_norm")
    row = command.measure(case, TINY, Ceilings(copy=1e9, matmul=1e12), with_peers=False)
    assert math.isclose(row.rate, case.work / row.us * 1e6)
    assert math.isclose(row.share, row.rate / 1e9)
    shown = command.Row(name="x", kind="copy", us=10.0, rate=2e12, share=0.5, peers_us={"slow": 30.0, "fast": 15.0})
    assert shown.cells() == ("x", "10.0", "2000.0 GB/s", "50 %", "fast", "15.0", "1.50")

    def fail() -> None:
        raise RuntimeError("no such kernel\nand more")

    broken = command.measure(
        command.Case(name="broken", kind="matmul", work=1.0, call=fail), TINY, Ceilings(copy=1.0, matmul=1.0)
    )
    assert broken.cells()[:2] == ("broken", "failed: RuntimeError: no such kernel")
    lines = command.table([shown.cells(), broken.cells()]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_a_group_that_cannot_be_built_leaves_a_row_and_the_other_groups_their_figures() -> None:
    def good(setting: Setting) -> Iterator[Case]:
        yield Case(name="good", kind="copy", work=1.0, call=lambda: setting)

    def _broken(setting: Setting) -> Iterator[Case]:
        yield from good(setting)
        raise RuntimeError("out of memory")

    found = list(command.all_cases(TINY, [_broken, good]))
    assert [case.name for case in found] == ["good", "rest of broken", "good"]
    row = found[1]
    assert isinstance(row, command.Row)
    assert row.cells()[:2] == ("rest of broken", "failed: not built: RuntimeError: out of memory")
    assert json.loads(json.dumps(row.content(), allow_nan=False))["us"] is None


def test_a_package_under_another_name_does_not_cost_the_results() -> None:
    assert versions(["torch", "no-such-package"])["no-such-package"] == "unknown"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == command.NO_GPU
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "no GPU" in printed.err


def test_processes_run_side_by_side_and_are_ended_at_the_budget() -> None:
    commands = [
        ("good", [sys.executable, "-c", "print('3 passed')"]),
        ("bad", [sys.executable, "-c", "print('1 failed'); raise SystemExit(1)"]),
    ]
    good, bad = device_tests.run(commands, budget_s=60.0)
    assert (good.outcome, good.summary, good.tail) == ("passed", "3 passed", "")
    assert (bad.outcome, bad.tail) == ("failed", "1 failed")
    (endless,) = device_tests.run([("endless", [sys.executable, "-c", "import signal; signal.pause()"])], budget_s=0.5)
    assert endless.outcome == "not finished"


def test_kernel_test_files_are_found_and_run_with_the_plugin() -> None:
    found = device_tests.files()
    assert {"test_sampling.py", "test_attention.py"} <= {path.name for path in found}
    assert not device_tests.WITHOUT_DEVICE - {path.name for path in (device_tests.ROOT / "tests/kernels").iterdir()}
    assert "tests.kernels.on_device" in device_tests.command(found[0])
