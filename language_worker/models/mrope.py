"""Position ids of Qwen's multimodal rotary embedding (M-RoPE). Pure arithmetic on grids; knows no model.

Text advances all three positions (temporal, height, width) together. A media item of t x h x w cells starts where the
text before it ended, counts its cells on the three axes, and the text after it goes on at start + max(h, w):

    index      0 1 2 | 3 4 5 6 (2 x 2 cells) | 7 8
    temporal   0 1 2 | 3 3 3 3               | 5 6
    height     0 1 2 | 3 3 4 4               | 5 6
    width      0 1 2 | 3 4 3 4               | 5 6
"""

from collections.abc import Sequence

import torch

from language_worker.models.base import PromptPositions

Grid = tuple[int, int, int]


def mrope_positions(length: int, media: Sequence[tuple[int, Grid]]) -> PromptPositions:
    """Positions of a prompt of `length` tokens; `media`: (index of the first token, merged grid t, h, w), ascending.

    Raises ValueError when items overlap or reach beyond the prompt.
    """
    ids = torch.empty((3, length), dtype=torch.int64)
    index, position = 0, 0
    for start, (t, h, w) in media:
        if start < index or start + t * h * w > length:
            raise ValueError(f"media item at {start} with grid {(t, h, w)} overlaps another or exceeds {length} tokens")
        ids[:, index:start] = torch.arange(position, position + start - index)
        position += start - index
        index = start + t * h * w
        cells = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).view(-1, 3)
        ids[:, start:index] = cells.T + position
        position += max(h, w)
    ids[:, index:] = torch.arange(position, position + length - index)
    return PromptPositions(ids=ids, delta=position - index)
