"""How much the test suite runs: the only reader of `TANDEM_TEST_PROFILE`.

`soak` runs full products and full counts (`make soak`); anything else is the everyday profile.
"""

from __future__ import annotations

import os

IS_SOAK = os.environ.get("TANDEM_TEST_PROFILE", "") == "soak"
