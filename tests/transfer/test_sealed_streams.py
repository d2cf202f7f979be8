"""The suites of the streams once more, as between hosts: payloads sealed, Blocks and Probes on a path of their own.

The tests are those of the modules imported here, the faults too: what is lost, repeated, reordered or corrupted on
either path, or who crashes, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.transfer.test_hostile import *  # noqa: F403
from tests.transfer.test_resume import *  # noqa: F403
from tests.transfer.test_revocation import *  # noqa: F403
from tests.transfer.test_streams import *  # noqa: F403
from tests.transfer.test_take_over import *  # noqa: F403
from tests.transfer.virtual import VirtualEndpoint


@pytest.fixture(autouse=True, scope="module")
def encrypted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtualEndpoint, "encrypted", True)
        yield


del test_a_block_that_fits_no_message_is_refused_at_both_ends  # noqa: F821 (its caps leave no room for seals)
