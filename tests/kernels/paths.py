"""The paths ops are judged on: torch, the Triton twin (interpreted on the CPU), and the C twin of ops that have one."""

from __future__ import annotations

from hypothesis import strategies as st

PATHS = ("torch", "triton")
paths = st.sampled_from(PATHS)
WITH_NATIVE = (*PATHS, "native")
with_native = st.sampled_from(WITH_NATIVE)

__all__ = ["PATHS", "WITH_NATIVE", "paths", "with_native"]
