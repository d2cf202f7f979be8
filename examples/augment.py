"""Training pictures in batches: training glyphs, warped afresh every time, on canvases of one size.

A batch is drawn with the layouts and palettes of `digits.draw`, but its glyphs are turned, sheared, stretched,
bent, thickened and blurred, because reading five digits right needs every single digit nearly always right.
Each 28x28 cell also gets labels for the auxiliary classifier of the first training phase.
This module knows pixels and labels; it does not know tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from examples.digits import CELL, COLOURS, HEIGHT, MAX_DIGITS, MAX_WIDTH, draw_layout, draw_palette, load_glyphs

CELLS_WIDE = MAX_WIDTH // CELL
CELLS_HIGH = HEIGHT // CELL
TILE = 46
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
NO_DIGIT = 10
NO_ORDER = MAX_DIGITS


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureBatch:
    """Canvases as RGB in 0..255 and as patches, how many cells of each are real, the answers, where each digit's centre
    lies from the left, and a label per cell."""

    pixels: Tensor
    patches: Tensor
    cells_wide: Tensor
    numbers: tuple[str, ...]
    colours: tuple[str, ...]
    centres: tuple[tuple[float, ...], ...]
    digit_labels: Tensor
    order_labels: Tensor
    colour_labels: Tensor


def draw_batch(rng: numpy.random.Generator, size: int, max_digits: int = MAX_DIGITS, warp: float = 1.0) -> PictureBatch:
    """`size` pictures of 1..max_digits training glyphs; `warp` scales how far these are turned, sheared and bent."""
    glyphs = load_glyphs()
    names = list(COLOURS)
    alpha = torch.zeros(size, HEIGHT + 2 * TILE, MAX_WIDTH + 2 * TILE)
    background, ink = torch.empty(size, 3), torch.empty(size, 3)
    digit_labels = torch.full((size, CELLS_WIDE), NO_DIGIT)
    order_labels = torch.full((size, CELLS_WIDE), NO_ORDER)
    placed: list[tuple[int, float, float, float]] = []
    chosen: list[int] = []
    numbers, colours, cells_wide, centres = [], [], [], []
    for row in range(size):
        layout = draw_layout(rng, int(rng.integers(1, max_digits + 1)))
        colour = names[int(rng.integers(len(names)))]
        paper, pen = draw_palette(rng, colour)
        background[row], ink[row] = torch.from_numpy(paper), torch.from_numpy(pen)
        ids = [int(i) for i in rng.choice(glyphs.train, size=len(layout.centres))]
        for order, (x, y) in enumerate(layout.centres):
            placed.append((row, x, y, layout.size))
            digit_labels[row, int(x // CELL)] = int(glyphs.digits[ids[order]])
            order_labels[row, int(x // CELL)] = order
        chosen.extend(ids)
        numbers.append("".join(str(glyphs.digits[i]) for i in ids))
        colours.append(colour)
        cells_wide.append(layout.width // CELL)
        centres.append(tuple(x for x, _ in layout.centres))
    _paste(alpha, placed, _warped_tiles(rng, torch.from_numpy(glyphs.ink[chosen]), placed, warp))
    alpha = alpha[:, None, TILE:-TILE, TILE:-TILE]
    pixels = (background[:, :, None, None] + alpha * (ink - background)[:, :, None, None]).round()
    width = torch.tensor(cells_wide)
    colour_labels = torch.tensor([names.index(colour) for colour in colours])
    real = torch.arange(CELLS_WIDE)[None, :] < width[:, None]
    return PictureBatch(
        pixels=pixels,
        patches=to_patches(pixels),
        cells_wide=width,
        numbers=tuple(numbers),
        colours=tuple(colours),
        centres=tuple(centres),
        digit_labels=_both_rows(digit_labels, real),
        order_labels=_both_rows(order_labels, real),
        colour_labels=_both_rows(colour_labels[:, None].expand(size, CELLS_WIDE), real),
    )


def to_patches(pixels: Tensor) -> Tensor:
    """RGB in 0..255 [B, 3, 56, W] to normalised patches [B, N, 3*14*14] in merged-cell order."""
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    normal = pixels * (1.0 / (255.0 * std)) - mean / std
    batch, channels, height, width = normal.shape
    half = CELL // 2
    grouped = normal.reshape(batch, channels, height // CELL, 2, half, width // CELL, 2, half)
    return grouped.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, -1, channels * half * half)


def _both_rows(labels: Tensor, real: Tensor) -> Tensor:
    """A column's label goes to its upper and its lower cell; -100 where the canvas is padding."""
    return labels.masked_fill(~real, -100)[:, None, :].expand(-1, CELLS_HIGH, -1).flatten(1)


def _warped_tiles(
    rng: numpy.random.Generator, ink: Tensor, placed: list[tuple[int, float, float, float]], warp: float
) -> Tensor:
    """Glyphs [N, 8, 8] to ink tiles [N, TILE, TILE], each centred with its sub-pixel offset."""
    count = len(placed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, size=count)).float()

    angle, shear = warp * uniform(-0.24, 0.24), warp * uniform(-0.25, 0.25)
    stretch_x, stretch_y = uniform(0.82, 1.12), uniform(0.85, 1.12)
    half = torch.tensor([size / 2 for *_, size in placed])
    cos, sin = angle.cos(), angle.sin()
    to_glyph = torch.stack([torch.stack([cos + shear * sin, sin - shear * cos], -1), torch.stack([-sin, cos], -1)], 1)
    to_glyph = to_glyph / (torch.stack([stretch_x, stretch_y], -1) * half[:, None])[:, :, None]
    axis = torch.arange(TILE).float() - (TILE - 1) / 2
    offset = torch.tensor([(x % 1.0 - 0.5, y % 1.0 - 0.5) for _, x, y, _ in placed])
    across = axis[None, None, :] - offset[:, 0, None, None] + torch.zeros(count, TILE, 1)
    down = axis[None, :, None] - offset[:, 1, None, None] + torch.zeros(count, 1, TILE)
    grid = torch.einsum("nij,nhwj->nhwi", to_glyph, torch.stack([across, down], dim=-1))
    bend = torch.from_numpy(rng.normal(0.0, 0.075, size=(count, 2, 4, 4))).float() * warp
    grid = grid + functional.interpolate(bend, TILE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    tiles = functional.grid_sample(
        _blurred(rng, ink[:, None]), grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )[:, 0]
    gain, lift = uniform(0.95, 1.55)[:, None, None], uniform(-0.2, 0.03)[:, None, None]
    return (tiles * gain + lift * (tiles > 0.05)).clamp(0.0, 1.0)


def _blurred(rng: numpy.random.Generator, ink: Tensor) -> Tensor:
    """Mix each small glyph with a softened and a fattened copy of itself, and a little pixel noise."""
    weights = torch.from_numpy(rng.uniform(0.0, 1.0, size=(len(ink), 2, 1, 1))).float()
    soft = functional.avg_pool2d(ink, 3, stride=1, padding=1)
    fat = functional.max_pool2d(ink, 2, stride=1, padding=1)[:, :, :8, :8]
    mixed = ink + 0.25 * weights[:, :1] * (soft - ink)
    mixed = mixed + 0.35 * (weights[:, 1:] - 0.6).clamp(min=0.0) * (fat - mixed)
    noise = torch.from_numpy(rng.normal(0.0, 0.05, size=tuple(ink.shape))).float()
    return (mixed + noise * (mixed > 0.02)).clamp(0.0, 1.0)


def _paste(alpha: Tensor, placed: list[tuple[int, float, float, float]], tiles: Tensor) -> None:
    """Keep the darker of picture and tile; `alpha` has a margin of TILE pixels on every side."""
    start = TILE - TILE // 2
    for tile, (row, x, y, _) in zip(tiles, placed, strict=True):
        top, left = int(y) + start, int(x) + start
        view = alpha[row, top : top + TILE, left : left + TILE]
        torch.maximum(view, tile, out=view)
