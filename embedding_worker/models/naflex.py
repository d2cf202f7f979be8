"""SigLIP 2 NaFlex: an image in its own shape, and features for as many places as the largest has patches.

    rows x columns of patches + positions, resized to them ──> layers ──> features of the patches
    one patch of zeros at the first position, which sees those, seen by none ──> that of every place left over

What was trained filled up with patches of zeros, and read their features like the others'. They are all the same, so
one of them is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from embedding_worker.models.base import Grid
from embedding_worker.models.vit import Encoder
from kernels.varlen_attention import Segments


class FlexibleEncoder(Encoder):
    """The loaded transformer; weights by the names of `encoder_shapes`."""

    def features_in_places(self, patches: torch.Tensor, grids: Sequence[Grid], num_places: int) -> torch.Tensor:
        """patches [sum(rows * columns), patch_dim], image after image -> features [images, num_places, hidden].

        Raises ValueError when patches and grids do not agree, or an image has more patches than places.
        """
        counts = [rows * columns for _, rows, columns in grids]
        wanted = (sum(counts), self.config.patch_dim)
        if patches.shape != wanted or any(not 0 < count <= num_places for count in counts):
            raise ValueError(
                f"patches are {tuple(patches.shape)}, and {list(grids)} make {wanted}, at most {num_places} an image"
            )
        is_filled = [count < num_places for count in counts]
        filler = self._weights["patch_embed.bias"][None]
        parts = []
        for embedded, grid, fill in zip(torch.split(self._embedded(patches), counts), grids, is_filled, strict=True):
            positions = self._positions(grid)
            parts.append(embedded + positions)
            parts += [filler + positions[:1]] if fill else []
        lengths = [count + fill for count, fill in zip(counts, is_filled, strict=True)]
        features = self._behind_layers(torch.cat(parts), Segments.from_lengths(lengths, is_filled))
        images = torch.split(features, lengths)
        return torch.stack([torch.cat((own, own[-1:].expand(num_places - len(own), -1))) for own in images])

    def _positions(self, grid: Grid) -> torch.Tensor:
        """[rows * columns, hidden]: those of the square, resized to the grid."""
        side, table = self.config.side, self._weights["positions"]
        plane = table.float().view(side, side, -1).permute(2, 0, 1)[None]
        plane = plane.contiguous()  # of a strided one torch makes a single column wrong
        resized = F.interpolate(plane, grid[1:], mode="bilinear", align_corners=False, antialias=True)
        return resized[0].flatten(1).T.to(table.dtype)
