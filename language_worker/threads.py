"""How many of torch's threads a part of a step is worth: its waiting threads take the cores from others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(is_small: bool) -> Iterator[None]:
    """Torch's operations inside run on this thread alone if they are small; for others nothing changes."""
    before = torch.get_num_threads()
    if is_small:
        torch.set_num_threads(1)  # takes 0.1 us, and holds for threads yet to come as well
    try:
        yield
    finally:
        if is_small:
            torch.set_num_threads(before)
