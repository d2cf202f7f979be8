"""The paths every op is judged on: torch, and its Triton twin (interpreted on the CPU)."""

from __future__ import annotations

from hypothesis import strategies as st

PATHS = ("torch", "triton")
paths = st.sampled_from(PATHS)

__all__ = ["PATHS", "paths"]
