"""Steps whose loops are shared with helpers of their own: the same bits, whoever asks and however many help."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels._native.library import library
from tests.kernels.test_decoder_layers import Case, Model, make_model
from tests.waiting import eventually

HELPER = "step helper"


def helpers() -> list[Path]:
    """Folders of the threads."""
    found = []
    for name in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # a thread of somebody else has ended
            if name.read_text().strip() == HELPER:
                found.append(name.parent)
    return found


def num_helpers() -> int:
    return len(helpers())


def parts_taken_by_helpers() -> int:
    path = library()
    assert path is not None
    count = ctypes.CDLL(str(path)).parts_taken_by_helpers
    count.restype = ctypes.c_int64
    return int(count())


def large(stored: str, dtype: torch.dtype) -> tuple[Model, Case]:
    """Of so many products that they are shared."""
    model = make_model(width=256, inner=400, dim=32, heads=8, kv_heads=4, stored=stored, dtype=dtype)
    return model, Case(model, [(5 * i % 60, 1 + i % 2) for i in range(20)], 16)


def expect_equal(model: Model, case: Case, alone: torch.Tensor, num_threads: int) -> None:
    shared = case.run(model, num_threads)
    assert shared is not None and torch.equal(shared, alone), f"{num_threads} threads"


def help_came(model: Model, case: Case, alone: torch.Tensor) -> bool:
    """Whether a helper takes a part of this step."""
    before = parts_taken_by_helpers()
    expect_equal(model, case, alone, 2)
    return parts_taken_by_helpers() > before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["plain", "int8"])
def test_any_number_of_helpers_gives_the_same_bits(stored: str, dtype: torch.dtype) -> None:
    model, case = large(stored, dtype)
    alone = case.run(model, 1)
    assert alone is not None
    for num_threads in (2, 3, 7, 2):
        for _ in range(10):
            expect_equal(model, case, alone, num_threads)

    def have_come() -> bool:
        expect_equal(model, case, alone, 7)  # a step that is not shared, as some are on a busy machine, calls nobody
        return num_helpers() >= 6

    eventually(have_come, "not all helpers came")


def test_helpers_take_parts_fall_asleep_and_wake_again() -> None:
    model, case = large("plain", torch.float32)
    alone = case.run(model, 1)
    assert alone is not None

    def are_asleep() -> bool:
        return all((folder / "stat").read_text().rpartition(")")[2].split()[0] == "S" for folder in helpers())

    for _ in range(3):
        eventually(partial(help_came, model, case, alone), "nobody helps")
        eventually(are_asleep, "a helper looks for work for ever")
    before = parts_taken_by_helpers()
    expect_equal(model, case, alone, 1)
    assert parts_taken_by_helpers() == before, "nobody was asked"


def test_few_products_behind_long_texts_are_shared_with_helpers() -> None:
    """Attention counts as well, and is not left to threads that spin on behind it."""
    model = make_model(width=64, inner=64, dim=32, heads=8, kv_heads=4)
    case = Case(model, [(4000, 1)] * 3, 128)
    alone = case.run(model, 1)
    assert alone is not None

    eventually(partial(help_came, model, case, alone), "nobody helps")


@pytest.mark.parametrize(
    ("waited", "share", "before", "expected"),
    [
        (0.0, 0.5, 0, 0), (0.5, 0.5, 0, 0), (0.6, 0.5, 0, 16), (0.6, 0.5, 16, 32), (0.9, 0.5, 256, 256),
        (0.5, 0.5, 256, 0), (0.8, 0.2, 0, 0), (0.9, 0.2, 0, 16), (0.0, 1.0, 64, 0), (0.2, 0.9, 0, 16),
        (0.05, 0.98, 0, 0), (1.0, 0.0, 0, 0),
    ],
)  # fmt: skip
def test_steps_that_were_quicker_alone_are_followed_by_some_alone(
    waited: float, share: float, before: int, expected: int
) -> None:
    path = library()
    assert path is not None
    steps_alone = ctypes.CDLL(str(path)).steps_alone
    steps_alone.argtypes = [ctypes.c_double, ctypes.c_double, ctypes.c_double, ctypes.c_int64]
    steps_alone.restype = ctypes.c_int64
    assert steps_alone(waited, 1.0, share, before) == expected


def test_steps_of_two_threads_at_once() -> None:
    """One has the helpers, the other does without."""
    model, case = large("plain", torch.float32)
    alone = case.run(model, 1)
    assert alone is not None
    failures: list[BaseException] = []
    gate = threading.Barrier(3)

    def ask() -> None:
        gate.wait()
        try:
            for _ in range(60):
                expect_equal(model, case, alone, 2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a step never ended"
    assert not failures


def in_a_process_of_its_own() -> None:
    """Helpers come when they are first needed, and a forked process makes its own."""
    model, case = large("plain", torch.float32)
    alone = case.run(model, 1)
    assert alone is not None and num_helpers() == 0
    expect_equal(model, case, alone, 3)
    eventually(lambda: num_helpers() == 2, "there are not two")
    small = Case(model, [(0, 1)], 16)
    assert small.run(model, 5) is not None
    assert num_helpers() == 2, "a small step is not shared"
    child = os.fork()
    if not child:
        try:
            assert num_helpers() == 0
            expect_equal(model, case, alone, 2)
            eventually(lambda: num_helpers() == 1, "there is not one")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    expect_equal(model, case, alone, 3)


def test_helpers_come_when_needed_and_survive_a_fork() -> None:
    script = f"from {__name__} import in_a_process_of_its_own; in_a_process_of_its_own()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
