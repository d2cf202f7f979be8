"""Encoded images to patches, as the published Qwen2-VL processor does it: bit for bit, in bounded memory.

Everything that can be refused is refused from the header, before any pixel is decoded. Orientation from EXIF is
applied, any mode becomes RGB (of an animation, the first frame), bicubic resize to multiples of the merged patch,
normalise, cut into patches. Knows nothing of models beyond `ImageSettings`.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from embedding_worker.errors import BadImage, ImageAspect, ImageTooLarge, OutOfResources
from embedding_worker.orientation import is_turned
from embedding_worker.patch_budget import fitted_patches
from embedding_worker.tiles import Tiling
from transfer.checkpoint_json import Kinds, wrong_values

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ASPECT = 200

PREPROCESSOR: Kinds = {  # of entries whose values are not checked one by one
    "size": "map",
    "image_mean": "numbers",
    "image_std": "numbers",
    "rescale_factor": "positive",
    "resample": "count",
}

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NAFLEX_DEFAULTS: Mapping[str, Any] = {  # the published processor's, where its file leaves them out
    "patch_size": 16, "max_num_patches": 256, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "resample": int(Image.Resampling.BILINEAR),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageSettings:
    """What the checkpoint's preprocessor_config.json says. min_pixels, max_pixels: area after resizing.

    side: pixels along both sides of every image, whatever its own; 0: what the area and the aspect ask for. crop: such
    a square is the middle of the image, resized by its shorter side; else the whole image is squeezed into it.
    max_patches: as many as an image of any shape is resized to, at most and about; 0: what the area asks for.
    tiling: the squares into which the image is cut besides; its grid is then its own size in pixels.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = _CLIP_MEAN
    std: tuple[float, ...] = _CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)
    side: int = 0
    crop: bool = False
    max_patches: int = 0
    tiling: Tiling | None = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImageSettings:
        """Read a preprocessor_config.json; `min_pixels` and `max_pixels` override it.

        Raises ValueError naming a field that is malformed, or a step that the file switches off.
        """
        for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not config.get(step, True):
                raise ValueError(f"preprocessor_config.json: {step}=false is not supported")
        default = cls()
        config = {name: value for name, value in config.items() if value is not None}
        if problems := wrong_values(config, PREPROCESSOR, "preprocessor_config.json"):
            raise ValueError("; ".join(problems))
        size = config.get("size") or {}
        low = [min_pixels, config.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")]
        high = [max_pixels, config.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")]
        settings = cls(
            min_pixels=_first(low, default.min_pixels),
            max_pixels=_first(high, default.max_pixels),
            patch_size=config.get("patch_size", default.patch_size),
            temporal_patch_size=config.get("temporal_patch_size", default.temporal_patch_size),
            merge_size=config.get("merge_size", default.merge_size),
            mean=tuple(config.get("image_mean", default.mean)),
            std=tuple(config.get("image_std", default.std)),
            rescale_factor=config.get("rescale_factor", default.rescale_factor),
            resample=config.get("resample", default.resample),
        )
        settings.validate()
        return settings

    @classmethod
    def square(cls, config: Mapping[str, Any], *, side: int, patch_size: int) -> ImageSettings:
        """Read the preprocessor_config.json of a model that sees squares of `side` pixels, cut into single patches.

        Raises ValueError naming a field that is malformed or says otherwise.
        """
        size = config.get("size") or {}
        size = size if isinstance(size, Mapping) else {"height": size, "width": size}
        crop = bool(config.get("do_center_crop", False))
        wanted = {"shortest_edge": side} if "shortest_edge" in size else {"height": side, "width": side}
        cropped = config.get("crop_size") or side
        cropped = cropped.get("height") if isinstance(cropped, Mapping) else cropped
        if size != wanted or ("shortest_edge" in size and not crop) or (crop and cropped != side):
            raise ValueError(
                f"preprocessor_config.json: size {size} and crop {crop}; the model sees {side}x{side} pixels"
            )
        plain = {name: value for name, value in config.items() if name != "size" and value is not None}
        read = cls.from_config({**plain, "patch_size": patch_size, "temporal_patch_size": 1, "merge_size": 1})
        return dataclasses.replace(read, side=side, crop=crop)

    @classmethod
    def flexible(cls, config: Mapping[str, Any], *, patch_size: int, max_patches: int) -> ImageSettings:
        """Read the preprocessor_config.json of a model that sees any shape in `max_patches` single patches.

        Raises ValueError naming a field that is malformed or says otherwise.
        """
        unread = ("size", "min_pixels", "max_pixels")
        given = {name: value for name, value in config.items() if name not in unread and value is not None}
        given = {**NAFLEX_DEFAULTS, **given}
        for name, wanted in (("patch_size", patch_size), ("max_num_patches", max_patches)):
            if given[name] != wanted:
                raise ValueError(f"preprocessor_config.json: {name} is {given[name]!r}; the model takes {wanted}")
        read = cls.from_config({**given, "patch_size": patch_size, "temporal_patch_size": 1, "merge_size": 1})
        return dataclasses.replace(read, max_patches=max_patches)

    def validate(self) -> None:
        """Raise ValueError on sizes that are not positive integers, or colour statistics not per channel."""
        for field in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"preprocessor_config.json: {field} must be a positive integer, got {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"preprocessor: min_pixels {self.min_pixels} exceeds max_pixels {self.max_pixels}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise ValueError("preprocessor_config.json: image_mean and image_std must hold 3 numbers, std not 0")

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """(1, rows, columns) of patches after resizing. Raises ValueError beyond the aspect limit."""
        if self.side:
            _check_aspect(height, width)
            if self.tiling is not None:
                return 1, height, width
            return 1, self.side // self.patch_size, self.side // self.patch_size
        if self.max_patches:
            _check_aspect(height, width)
            return 1, *fitted_patches(height, width, self.patch_size, self.max_patches)
        resized = smart_resize(height, width, self.patch_size * self.merge_size, self.min_pixels, self.max_pixels)
        return 1, resized[0] // self.patch_size, resized[1] // self.patch_size

    def num_patches(self, grid: tuple[int, int, int]) -> int:
        """Patches that an image of this grid is cut into."""
        if self.tiling is None:
            return math.prod(grid)
        return self.tiling.num_squares(*grid[1:]) * (self.side // self.patch_size) ** 2

    def digest(self) -> str:
        """Stable text of all settings, for content keys."""
        return repr(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PreparedImage:
    """patches: [t * h * w, 3 * temporal * patch^2] float32, merged patches together; grid: (t, h, w) in patches."""

    patches: torch.Tensor
    grid: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What is refused before decoding."""

    max_bytes: int
    max_pixels: int


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width as multiples of `factor`, area within bounds, aspect kept as well as that allows.

    The published rule, Python's round-half-even included. Raises ValueError beyond an aspect ratio of 200.
    """
    _check_aspect(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def _check_aspect(height: int, width: int) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT:
        raise ValueError(f"{width}x{height} pixels have an aspect ratio of {ratio:.1f}, the model allows {MAX_ASPECT}")


def inspect_image(
    media: bytes | memoryview, index: int, settings: ImageSettings, limits: ImageLimits
) -> tuple[int, int, int]:
    """The grid that `prepare_image` will give, from the header alone; `index` is the image's place, for messages.

    Raises BadImage, ImageTooLarge or ImageAspect. Pixels that turn out to be corrupt are found by `prepare_image`.
    """
    image = _open_checked(media, index, limits)
    try:
        width, height = (image.height, image.width) if is_turned(image, media) else (image.width, image.height)
        return settings.grid(height, width)
    except ValueError as error:
        raise ImageAspect(index, str(error)) from error


def prepare_image(media: bytes | memoryview, index: int, settings: ImageSettings, limits: ImageLimits) -> PreparedImage:
    """Decode, resize, normalise and cut one encoded image; `index` is its place in the request, for messages.

    Peak memory is about 8 bytes per decoded pixel. Raises BadImage, ImageTooLarge, ImageAspect or OutOfResources.
    """
    grid = inspect_image(media, index, settings, limits)
    try:
        image = _open_checked(media, index, limits)
        ImageOps.exif_transpose(image, in_place=True)
        colour = image if image.mode == "RGB" else image.convert("RGB")
        if settings.grid(colour.height, colour.width) != grid:
            raise ValueError("the pixels do not have the size that the header says")
        patches = [_cut(np.asarray(view), settings) for view in _views(colour, grid, settings)]
    except Exception as error:  # decoders raise anything at all on hostile bytes
        _raise_if_out_of_resources(error)
        raise BadImage(index, "the image data are truncated or corrupt") from error
    return PreparedImage(patches=patches[0] if len(patches) == 1 else torch.cat(patches), grid=grid)


def content_key(media: bytes | memoryview, settings: ImageSettings, fingerprint: str, dtype: str) -> str:
    """Hex name of an embedding: equal exactly when media, preprocessing, model and dtype are equal."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in (settings.digest(), fingerprint, dtype):
        hasher.update(f"{len(part)}:{part}".encode())
    hasher.update(media)
    return hasher.hexdigest()


def _raise_if_out_of_resources(error: Exception) -> None:
    """What is no fault of the image."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise OutOfResources(str(error) or "no memory is left") from error


def _open_checked(media: bytes | memoryview, index: int, limits: ImageLimits) -> Image.Image:
    """Read the header only, and refuse what is too large."""
    if len(media) > limits.max_bytes:
        raise ImageTooLarge(index, f"{len(media)} bytes, at most {limits.max_bytes} are allowed")
    try:
        image = Image.open(io.BytesIO(media), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(index, f"far too many pixels, at most {limits.max_pixels} pixels are allowed") from error
    except Exception as error:  # decoders raise anything at all on hostile bytes
        _raise_if_out_of_resources(error)
        raise BadImage(index, f"not an image this server can read; it reads {', '.join(FORMATS)}") from error
    if image.width * image.height > limits.max_pixels:
        size = f"{image.width}x{image.height} pixels"
        raise ImageTooLarge(index, f"{size}, at most {limits.max_pixels} pixels are allowed")
    if not image.width or not image.height:
        raise BadImage(index, "the image has no pixels")
    return image


def _views(image: Image.Image, grid: tuple[int, int, int], settings: ImageSettings) -> list[Image.Image]:
    """What is cut into patches, one after the other."""
    how, side = Image.Resampling(settings.resample), settings.side
    if settings.tiling is not None:
        return [image.resize((side, side), resample=how), *_squares(image, settings.tiling, how)]
    if not settings.crop:
        size = (side, side) if side else (grid[2] * settings.patch_size, grid[1] * settings.patch_size)
        return [image.resize(size, resample=how)]
    short = min(image.size)
    width, height = (int(side * length / short) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return [image.resize((width, height), resample=how).crop((left, top, left + side, top + side))]


def _squares(image: Image.Image, tiling: Tiling, how: Image.Resampling) -> list[Image.Image]:
    """The squares of the image on its canvas, row by row."""
    down, across = tiling.canvas(image.height, image.width)
    height, width = tiling.fitted(image.height, image.width)
    side = tiling.side
    canvas = Image.new("RGB", (across * side, down * side))
    canvas.paste(
        image.resize((width, height), resample=how), ((canvas.width - width) // 2, (canvas.height - height) // 2)
    )
    corners = [(x, y) for y in range(0, canvas.height, side) for x in range(0, canvas.width, side)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def _cut(pixels: np.ndarray[Any, np.dtype[np.uint8]], settings: ImageSettings) -> torch.Tensor:
    """[H, W, 3] bytes to [patches, 3 * temporal * patch^2] float32, patches of one merged token side by side.

    A byte has 256 values, so rescaling and normalising is a table per channel, computed as the reference computes it.
    Pixels on the right and below that fill no patch are left out.
    """
    patch, merge = settings.patch_size, settings.merge_size
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    blocks = pixels[: rows * patch, : columns * patch].reshape(
        rows // merge, merge, patch, columns // merge, merge, patch, 3
    )
    blocks = blocks.transpose(6, 0, 3, 1, 4, 2, 5).reshape(3, rows * columns, 1, patch, patch)
    scaled = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    out = np.empty((rows * columns, 3, settings.temporal_patch_size, patch, patch), dtype=np.float32)
    for channel, (mean, std) in enumerate(zip(settings.mean, settings.std, strict=True)):
        table = (scaled - np.float32(mean)) / np.float32(std)
        out[:, channel] = table[blocks[channel]]
    return torch.from_numpy(out.reshape(rows * columns, -1))


def _first(candidates: list[int | None], default: int) -> int:
    return next((value for value in candidates if value is not None), default)
