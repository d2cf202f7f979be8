"""Encoded test images: good ones of many kinds, and every way of being bad."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from tests.tiny_models import random_image


def encode(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    """The image file as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png(width: int, height: int, seed: int = 0) -> bytes:
    """A random RGB image as PNG."""
    return encode(random_image(width, height, seed=seed))


def turned(orientation: int, format_: str) -> bytes:
    """An image that EXIF says to turn."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(random_image(90, 40, seed=orientation), format_, exif=exif)


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def exif_payload(orientation: int) -> bytes:
    """EXIF that holds an orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes().removeprefix(b"Exif\x00\x00")


def with_chunk(plain: bytes, chunk: bytes, before: bytes = b"IEND") -> bytes:
    """A PNG with `chunk` in front of its last chunk of the kind `before`."""
    at = plain.rindex(before) - 4
    return plain[:at] + chunk + plain[at:]


def late_exif_png(orientation: int) -> bytes:
    """A PNG whose EXIF chunk comes behind the pixels."""
    return with_chunk(png(90, 40), png_chunk(b"eXIf", exif_payload(orientation)))


def raw_profile(orientation: int) -> bytes:
    """A text chunk with EXIF in hexadecimal, as ImageMagick writes it."""
    payload = b"Exif\x00\x00" + exif_payload(orientation)
    text = f"\nexif\n{len(payload):8d}\n{payload.hex()}\n"
    return png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text.encode()))


def xmp(orientation: int) -> bytes:
    """A text chunk with XMP that says how to turn the image."""
    packet = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    return png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet.encode())


def header_only_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" * 64))
    data = png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def _animated(format_: str) -> bytes:
    frames = [random_image(70, 50, seed=i) for i in range(3)]
    return encode(frames[0], format_, save_all=True, append_images=frames[1:])


def _sixteen_bit() -> bytes:
    values = np.random.default_rng(0).integers(0, 65536, (45, 61), dtype=np.uint16)
    return encode(Image.fromarray(values))


def _transparent_palette() -> bytes:
    return encode(random_image(61, 45).quantize(17), transparency=3)


def _converted(mode: str, format_: str = "PNG") -> Callable[[], bytes]:
    return lambda: encode(random_image(61, 45).convert(mode), format_)


GOOD: dict[str, Callable[[], bytes]] = {
    "rgb": lambda: png(61, 45),
    "rgba": _converted("RGBA"),
    "palette": lambda: encode(random_image(61, 45).quantize(17)),
    "transparent palette": _transparent_palette,
    "grey": _converted("L"),
    "grey alpha": _converted("LA"),
    "bilevel": _converted("1"),
    "16 bit": _sixteen_bit,
    "cmyk jpeg": _converted("CMYK", "JPEG"),
    "grey jpeg": _converted("L", "JPEG"),
    "jpeg": lambda: encode(random_image(203, 97), "JPEG", quality=80),
    "progressive jpeg": lambda: encode(random_image(203, 97), "JPEG", progressive=True),
    "webp": lambda: encode(random_image(61, 45), "WEBP"),
    "bmp": lambda: encode(random_image(61, 45), "BMP"),
    "gif": lambda: encode(random_image(61, 45), "GIF"),
    "tiff": lambda: encode(random_image(61, 45), "TIFF"),
    "float tiff": _converted("F", "TIFF"),
    "ycbcr tiff": _converted("YCbCr", "TIFF"),
    "animated gif": lambda: _animated("GIF"),
    "animated webp": lambda: _animated("WEBP"),
    "animated png": lambda: _animated("PNG"),
    "one pixel": lambda: png(1, 1),
    "one pixel wide": lambda: png(1, 200),
    "late exif png": lambda: late_exif_png(6),
    "png of two exif chunks": lambda: with_chunk(turned(3, "PNG"), png_chunk(b"eXIf", exif_payload(6))),
    "png that speaks of eXIf": lambda: with_chunk(png(90, 40), png_chunk(b"tEXt", b"Comment\0eXIf")),
    "animated png of a late exif": lambda: with_chunk(_animated("PNG"), png_chunk(b"eXIf", exif_payload(6))),
    **{
        f"png of {kind} before {place}": (
            lambda make=make, place=place: with_chunk(png(90, 40), make(8), place.encode())
        )
        for kind, make in (("raw profile", raw_profile), ("xmp", xmp))
        for place in ("IDAT", "IEND")
    },
    **{f"jpeg turned {i}": (lambda i=i: turned(i, "JPEG")) for i in range(1, 9)},
    **{f"{kind} turned 8": (lambda kind=kind: turned(8, kind)) for kind in ("PNG", "WEBP", "TIFF")},
}

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "BadImage"),
    "text": (lambda: b"hello, I am a picture", "BadImage"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "BadImage"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "BadImage"),
    "png cut short": (lambda: png(61, 45)[:-400], "BadImage"),
    "png header only": (lambda: png(61, 45)[:33], "BadImage"),
    "jpeg cut short": (lambda: encode(random_image(203, 97), "JPEG")[:3000], "BadImage"),
    "webp cut short": (lambda: encode(random_image(203, 97), "WEBP")[:900], "BadImage"),
    "gif cut short": (lambda: encode(random_image(203, 97), "GIF")[:900], "BadImage"),
    "png of no pixels": (lambda: header_only_png(0, 5), "BadImage"),
    "png without data": (lambda: header_only_png(50, 50), "BadImage"),
    "3 by 2000": (lambda: png(3, 2000), "ImageAspect"),
    "2000 by 3": (lambda: png(2000, 3), "ImageAspect"),
    "bomb": (lambda: header_only_png(20000, 20000), "ImageTooLarge"),
    "just too large": (lambda: header_only_png(1001, 1000), "ImageTooLarge"),
    "too many bytes": (lambda: png(61, 45) + b"\0" * 2_000_000, "ImageTooLarge"),
}
