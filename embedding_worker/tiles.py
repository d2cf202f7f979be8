"""How LLaVA's family sees an image of any shape: once whole in a square, and once cut into squares.

    image ──> squeezed into one square ─────────────────────────────────> overview, all its features
          └─> fitted into the best canvas of squares, black around it ──> features side by side as they lay, those of
                                                                          the black dropped, shrunk where they are many

Plain numbers for both ends of it: what is done to the pixels, and how many rows and columns of features come of it.
Knows no pixels and no model.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

SHRINK_FROM = 1.1  # a plane of features is left as it is until its sides exceed the limit by this factor
Size = tuple[int, int]
"""(rows, columns), or (height, width)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """side: pixels along a square. features: of one square along a side. canvases: (squares down, squares across) to
    choose from; of two that show equally much the first. max_squares: the features of so many squares at most come
    out, about; 0: of as many as there are.
    """

    side: int
    features: int
    canvases: tuple[Size, ...]
    max_squares: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, side: int, features: int) -> Tiling:
        """Read image_aspect_ratio and image_grid_pinpoints of config.json. Raises ValueError for what is not served."""
        kind = config.get("image_aspect_ratio")
        limit = re.fullmatch(r"anyres(?:_max_(\d+))?", kind) if isinstance(kind, str) else None
        if limit is None:
            raise ValueError(f"image_aspect_ratio is {kind!r}; served are 'anyres' and 'anyres_max_N'")
        sizes = _pinpoints(config.get("image_grid_pinpoints"), side)
        if not sizes or any(width % side or height % side or min(width, height) < side for width, height in sizes):
            raise ValueError(
                f"image_grid_pinpoints are {config.get('image_grid_pinpoints')!r}; they must be sizes in pixels, "
                f"multiples of the vision tower's {side}"
            )
        canvases = tuple((height // side, width // side) for width, height in sizes)
        return cls(side=side, features=features, canvases=canvases, max_squares=int(limit[1] or 0))

    def canvas(self, height: int, width: int) -> Size:
        """(squares down, across) of the canvas that shows most of an image's pixels, and of those the smallest."""

        def shown(canvas: Size) -> tuple[int, int]:
            rows, columns = canvas[0] * self.side, canvas[1] * self.side
            scale = min(columns / width, rows / height)
            area = min(int(width * scale) * int(height * scale), width * height)
            return area, area - rows * columns

        return max(self.canvases, key=shown)

    def fitted(self, height: int, width: int) -> Size:
        """(height, width) to which an image is resized, to lie in the middle of its canvas."""
        down, across = self.canvas(height, width)
        rows, columns = down * self.side, across * self.side
        by_width, by_height = columns / width, rows / height
        if by_width < by_height:
            return min(math.ceil(height * by_width), rows), columns
        return rows, min(math.ceil(width * by_height), columns)

    def kept(self, height: int, width: int) -> Size:
        """(rows, columns) of features that show the image, in the middle of its canvas'."""
        down, across = self.canvas(height, width)
        rows, columns = down * self.features, across * self.features
        if width / height > columns / rows:
            return _within(rows, int(height * (columns / width))), columns
        return rows, _within(columns, int(width * (rows / height)))

    def shrunk(self, height: int, width: int) -> Size:
        """(rows, columns) of features that come out."""
        rows, columns = self.kept(height, width)
        times = math.sqrt(rows * columns / (self.max_squares * self.features**2)) if self.max_squares else 0.0
        return (int(rows // times), int(columns // times)) if times > SHRINK_FROM else (rows, columns)

    def num_squares(self, height: int, width: int) -> int:
        """Squares of an image: the overview, and the canvas'."""
        return 1 + math.prod(self.canvas(height, width))

    def num_rows(self, height: int, width: int) -> int:
        """Embedding rows of an image: the overview's, and line by line the canvas', each line with one more behind."""
        rows, columns = self.shrunk(height, width)
        return self.features**2 + rows * (columns + 1)


def _within(length: int, inner: int) -> int:
    """What is left of `length` when equally much goes on both sides and at least `inner` stays."""
    return length - 2 * ((length - inner) // 2)


def _pinpoints(value: Any, side: int) -> list[Size]:
    """(width, height) of every canvas in pixels: a list, its text, or a text as "(1x1),...,(6x6)"; [] for others."""
    if isinstance(value, str) and (ends := re.findall(r"\((\d+)x(\d+)\)", value)):
        (low_x, low_y), (high_x, high_y) = (tuple(map(int, end)) for end in (ends[0], ends[-1]))
        return [(x * side, y * side) for x in range(low_x, high_x + 1) for y in range(low_y, high_y + 1)]
    try:
        sizes = ast.literal_eval(value) if isinstance(value, str) else value
        pairs = [(width, height) for width, height in sizes]
    except (ValueError, SyntaxError, TypeError):
        return []
    return pairs if all(type(number) is int for pair in pairs for number in pair) else []
