"""Shared tiny checkpoints; one torch thread, so that results and run times do not depend on the machine's load."""

from pathlib import Path

import pytest
import torch

from tests.tiny_models import make_qwen2_5_vl


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default tiny Qwen2.5-VL checkpoint."""
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"))
