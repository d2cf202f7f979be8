"""Whether an image lies on its side: its orientation, from the metadata alone, before any pixel is decoded.

A PNG may carry it behind its pixels, which PIL would decode on the way there; so its metadata are read around a single
pixel instead. Beside `preprocess.py` the only file that imports PIL.
"""

from __future__ import annotations

import io
import struct
import zlib

from PIL import ExifTags, Image

MAX_PNG_CHUNKS = 65536  # walked in search of the orientation; an image within the byte limits has a few thousand

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # where EXIF or XMP may say how to turn the image


def is_turned(image: Image.Image, media: bytes | memoryview) -> bool:
    """Whether EXIF orientation swaps width and height. Of TIFF, PIL gives the turned size at once."""
    if image.format == "TIFF":
        return False
    try:
        if image.format == "PNG":
            image = _png_without_pixels(memoryview(media), bool(getattr(image, "is_animated", False)))
            image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable metadata: the pixels may be fine, and decoding will tell
        return False
    return orientation in (5, 6, 7, 8)


def _png_without_pixels(media: memoryview, is_animated: bool) -> Image.Image:
    """The metadata of a PNG around a single pixel, where PIL reads them as it would in `media`.

    PNG may carry them behind the pixels, and PIL decodes all of those to get there. What a reader of the first frame
    does not see (behind IEND, or in the next frame of an animation) is left out, and so is all beyond MAX_PNG_CHUNKS.
    """
    before: list[bytes] = [_PIXEL_HEADER]
    behind: list[bytes] = []
    position, pixels_seen = len(_PNG_SIGNATURE), False
    for _ in range(MAX_PNG_CHUNKS):
        if position + 12 > len(media):
            break
        length, kind = struct.unpack_from(">I4s", media, position)
        end = position + 12 + length
        if kind == b"IEND" or (kind == b"fcTL" and pixels_seen and is_animated) or end > len(media):
            break
        if kind in _PNG_METADATA:
            (behind if pixels_seen else before).append(bytes(media[position:end]))
        pixels_seen = pixels_seen or kind == b"IDAT"
        position = end
    parts = [_PNG_SIGNATURE, *before, _PIXEL_DATA, *behind, _png_chunk(b"IEND", b"")]
    return Image.open(io.BytesIO(b"".join(parts)), formats=("PNG",))


def _png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


_PIXEL_HEADER = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))  # 1 x 1, 8 bit, grey
_PIXEL_DATA = _png_chunk(b"IDAT", zlib.compress(b"\0\0"))
