"""Image URLs."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ClientError, ImageTooLarge, InvalidImageUrl, MediaNotAllowed
from cluster.media import parse_image_url


@settings(max_examples=100, derandomize=True, deadline=None)
@given(data=st.binary(min_size=1, max_size=200), kind=st.sampled_from(["png", "jpeg", "webp", "gif", "x-icon", "PNG"]))
def test_what_was_encoded_comes_back(data: bytes, kind: str) -> None:
    encoded = base64.b64encode(data).decode()
    for url in (f"data:image/{kind};base64,{encoded}", f"DATA:image/{kind};name=a.png;BASE64,{encoded}"):
        assert parse_image_url(url, max_bytes=200) == data


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("http://host/x.png", MediaNotAllowed, "http:"),
        ("HTTPS://host/x.png", MediaNotAllowed, "https:"),
        ("file:///etc/passwd", MediaNotAllowed, "file:"),
        ("ftp://x", MediaNotAllowed, "ftp:"),
        ("", InvalidImageUrl, "not a URL"),
        ("/etc/passwd", InvalidImageUrl, "not a URL"),
        ("iVBORw0KGgo=", InvalidImageUrl, "not a URL"),
        ("data:", InvalidImageUrl, "no header"),
        ("data:image/png;base64", InvalidImageUrl, "no header"),
        ("data:," + "A" * 8, InvalidImageUrl, "no media type"),
        ("data:text/html;base64,AAAA", InvalidImageUrl, "text/html"),
        ("data:image/svg+xml;base64,AAAA", InvalidImageUrl, "svg"),
        ("data:image/png,AAAA", InvalidImageUrl, "not declared as base64"),
        ("data:image/png;base64;x=1,AAAA", InvalidImageUrl, "not declared as base64"),
        ("data:image/png;base64,", InvalidImageUrl, "no data"),
        ("data:image/png;base64,AAA", InvalidImageUrl, "base64"),
        ("data:image/png;base64,AA AA", InvalidImageUrl, "base64"),
        ("data:image/png;base64,AA\nAA", InvalidImageUrl, "base64"),
        ("data:image/png;base64,AA-_", InvalidImageUrl, "base64"),
        ("data:image/png;base64,AAAé", InvalidImageUrl, "alphabet"),
        ("data:image/png;base64,=AAA", InvalidImageUrl, "base64"),
        ("data:image/png;" + "x" * 1000 + ";base64,AAAA", InvalidImageUrl, "no header"),
    ],
)
def test_what_is_refused_and_why(url: str, error: type[ClientError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        parse_image_url(url, max_bytes=100, param="image 3")
    assert caught.value.param == "image 3"


@pytest.mark.parametrize("size", [10, 11, 12, 13])
def test_the_cap_is_on_the_decoded_bytes(size: int) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"x" * size).decode()
    assert parse_image_url(url, max_bytes=size) == b"x" * size
    with pytest.raises(ImageTooLarge):
        parse_image_url(url, max_bytes=size - 1)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="data:imgepn/;bs64,A=", max_size=40).map(lambda tail: "data:" + tail))
def test_any_text_is_an_image_or_a_typed_error(url: str) -> None:
    try:
        assert parse_image_url(url, max_bytes=1000)
    except ClientError as error:
        assert str(error)
