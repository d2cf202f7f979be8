"""What a forward pass is computed in, and the scaler that float16 needs.

bfloat16 reaches as far as float32 and needs none. float16's gradients vanish below 6e-8 unless the loss is scaled up:
the scale starts at 65,536, doubles after 2000 good steps, and halves where gradients overflow, a step which is left
out. Weights, optimizer and loss stay in float32 throughout.
"""

from __future__ import annotations

from typing import Literal

import torch

PrecisionName = Literal["float32", "bfloat16", "float16"]


class Precision:
    """One run's forward dtype and gradient scaler; both do nothing in float32."""

    def __init__(self, name: PrecisionName) -> None:
        self.name = name
        self.scaler = torch.amp.GradScaler("cpu", enabled=name == "float16")

    def autocast(self) -> torch.autocast:
        """The context that linear layers of a forward pass run in."""
        dtype = torch.float16 if self.name == "float16" else torch.bfloat16
        return torch.autocast("cpu", dtype, enabled=self.name != "float32")
