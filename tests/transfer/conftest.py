"""What several transfer tests share: whole streams run twice, with payload over the wire and in shared memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.transfer.patience import allow_for_handshakes
from tests.transfer.virtual import Pair
from transfer.memory.segments import is_supported


@pytest.fixture(autouse=True, scope="package")
def _segments_may_take_their_time() -> Iterator[None]:
    before = allow_for_handshakes()
    yield
    allow_for_handshakes(before)


@pytest.fixture
def wire_only(payload: str) -> None:
    """For what is about frames on the wire."""
    if payload != "wire":
        pytest.skip("there are no such frames in shared memory")


@pytest.fixture(scope="module", params=["wire", "shm"])
def payload(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the rows of every Pair of the module travel."""
    if request.param == "shm" and not is_supported():
        pytest.skip("this system has no sealed memory files")
    Pair.has_segments = request.param == "shm"
    yield request.param
    Pair.has_segments = False
