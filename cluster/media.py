"""Image references of a request -> encoded image bytes, within caps.

Only `data:` URLs are read here: strictly base64, of a raster image type, at most so many bytes. Everything that would
make the server fetch something is refused by name (`gateway.media_fetch` is for http(s) URLs of hosts that are listed).
Does not decode the image; the embedding worker does, in bounded memory.
"""

from __future__ import annotations

import base64
import binascii
import re

from cluster.errors import ImageTooLarge, InvalidImageUrl, MediaNotAllowed

_DATA_URL = re.compile(r"data:([^;,]*)((?:;[^;,]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"\A[A-Za-z][A-Za-z0-9+.\-]{0,31}:")
_IMAGE_TYPE = re.compile(r"image/[a-z0-9][a-z0-9.+\-]{0,63}\Z")
_VECTOR_TYPES = frozenset({"image/svg+xml", "image/svg"})
_MAX_HEADER_CHARS = 256


def parse_image_url(url: str, *, max_bytes: int, param: str | None = None) -> bytes:
    """The encoded image in a `data:image/...;base64,...` URL. `param` names the request's field in errors.

    Raises MediaNotAllowed for other schemes, InvalidImageUrl for malformed URLs, ImageTooLarge above `max_bytes`
    (judged from the length of the text, before anything is decoded).
    """
    if not url[:5].lower() == "data:":
        raise _not_a_data_url(url, param)
    header = _DATA_URL.match(url, 0, _MAX_HEADER_CHARS)
    if header is None:
        raise InvalidImageUrl("the data URL has no header; use data:image/png;base64,<data>", param)
    media_type = header.group(1).strip().lower()
    if not _IMAGE_TYPE.match(media_type) or media_type in _VECTOR_TYPES:
        what = repr(media_type[:64]) if media_type else "no media type"
        raise InvalidImageUrl(f"the data URL declares {what}; use a raster image type such as image/png", param)
    attributes = [attribute.strip().lower() for attribute in header.group(2).split(";")[1:]]
    if not attributes or attributes[-1] != "base64":
        raise InvalidImageUrl("the data URL is not declared as base64; use data:image/png;base64,<data>", param)
    return _decode(url, header.end(), max_bytes, param)


def is_http_url(url: str) -> bool:
    """Whether its scheme is http or https."""
    return url[:8].lower().startswith(("http://", "https://"))


def _decode(url: str, start: int, max_bytes: int, param: str | None) -> bytes:
    num_chars = len(url) - start
    if num_chars == 0:
        raise InvalidImageUrl("the data URL carries no data", param)
    if num_chars // 4 * 3 - 2 > max_bytes:
        raise ImageTooLarge(f"the image has about {num_chars // 4 * 3} bytes; at most {max_bytes} are allowed", param)
    payload = url[start:]
    try:
        data = base64.b64decode(payload.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        reason = "a character outside the alphabet" if isinstance(error, UnicodeEncodeError) else str(error)
        raise InvalidImageUrl(f"the data URL is not valid base64: {reason}", param) from None
    if len(data) > max_bytes:
        raise ImageTooLarge(f"the image has {len(data)} bytes; at most {max_bytes} are allowed", param)
    return data


def _not_a_data_url(url: str, param: str | None) -> Exception:
    scheme = _SCHEME.match(url)
    if scheme is None:
        return InvalidImageUrl("image_url.url is not a URL; use data:image/png;base64,<data>", param)
    name = scheme.group()[:-1].lower()
    return MediaNotAllowed(f"this server does not fetch {name}: URLs; send the image as a data: URL", param)
