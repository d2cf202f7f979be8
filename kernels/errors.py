"""Errors of this package.

    KernelError
    ├── NativeUnavailable   the C path was asked for where it cannot be compiled
    └── TritonUnavailable   the Triton path was asked for where it cannot run

Shapes and dtypes that an op does not take are a ValueError of the op.
"""

from __future__ import annotations


class KernelError(Exception):
    """Root of the tree. The message says what happened, to what, and what to do."""


class NativeUnavailable(KernelError):
    """The C path was asked for, but no C compiler is installed or it failed (the log says how)."""


class TritonUnavailable(KernelError):
    """The Triton path was asked for, but Triton is not installed or cannot run on the tensors' device."""
