"""Triton kernels run on the CPU, in Triton's interpreter, unless there is a GPU.

Set here, before anything is collected: Triton decides when it is first imported, and test modules of other folders
import it through their oracles.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
