"""Triton kernels run on the CPU, in Triton's interpreter, unless there is a GPU. Set before any kernel is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
