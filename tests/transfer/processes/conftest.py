"""The nursery of peers, once for all of them; every test ends the peers it started."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.transfer.processes.harness import Nursery


@pytest.fixture(scope="package")
def nursery_process() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def nursery(nursery_process: Nursery) -> Iterator[Nursery]:
    yield nursery_process
    nursery_process.end_peers()
