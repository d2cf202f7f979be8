"""For all tests: Triton's interpreter, no GPU, and a run that always ends.

The interpreter is chosen here, before anything is collected: Triton decides when it is first imported, and test
modules of other folders import it through their oracles. Where there is a GPU it stays unseen, so that the suite is
the same everywhere; the kernel tests run there with the plugin `tests.kernels.on_device` (`tandem bench kernels`).
"""

from __future__ import annotations

import faulthandler
import os
import sys

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)  # the same examples in every run
settings.load_profile("fixed")

EXIT_S = 120.0  # a process that has not ended so long after its last test hangs

if "tests.kernels.on_device" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """A thread that a failed test left cannot keep the run from ending: its stack is shown, and the status is 1."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(EXIT_S, exit=True, file=sys.__stderr__)
