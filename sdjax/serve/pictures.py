"""Pictures from strangers: checked by their headers before they are decoded; from bytes, never from a URL."""

import base64
import binascii
import io
import re
from typing import NamedTuple

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MOST_SCANS = 64
"""A progressive JPEG file has about ten; one with thousands takes minutes."""
ORIENTATION = 0x0112
"""The EXIF tag; values from 5 on exchange width and height."""
BROKEN = "it is truncated or broken"
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
_FROM_URL_SAFE = str.maketrans("-_", "+/", " \t\r\n\v\f")


class PictureError(ValueError):
    """Bytes that are no picture that we take; the message says why."""


class Limits(NamedTuple):
    """Of pictures that come in: each side in pixels, and their product."""

    least_side: int = 64
    side: int = 8192
    pixels: int = 2**24


class Given(NamedTuple):
    """A picture that came with a request: its file, and what is in it."""

    data: bytes
    picture: Image.Image


def from_base64(text: str) -> bytes:
    """Decode base64 in any dress: with a `data:` prefix, line breaks, the URL-safe alphabet, or no padding.

    Raises:
        PictureError: it isn't base64.
    """
    if text[:5].lower() == "data:":
        prefix = _DATA_URI.match(text)
        if prefix is None:
            raise PictureError("a data URI must be like data:image/png;base64,...")
        text = text[prefix.end() :]
    digits = text.translate(_FROM_URL_SAFE).rstrip("=")
    if not digits:
        raise PictureError("it is empty")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("it is not base64") from None


def read_picture(data: bytes, limits: Limits = Limits()) -> Image.Image:  # noqa: B008 (immutable)
    """Decode a PNG, JPEG or WebP file whole, once its header has shown that it is small enough and doesn't move.

    How long that takes is bounded by nothing but the scans of a JPEG file: see `sdjax.serve.decoder`.

    Raises:
        PictureError: it is something else, broken, animated, or beyond the limits.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise PictureError(f"it has more than {limits.pixels} pixels") from None
    except Exception:  # decoders answer to broken bytes with errors of any kind
        raise PictureError(f"it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    with picture:
        width, height = picture.size
        if min(width, height) < limits.least_side or max(width, height) > limits.side:
            raise PictureError(
                f"it is {width}x{height}: each side must be from {limits.least_side} to {limits.side} pixels"
            )
        if width * height > limits.pixels:
            raise PictureError(f"it is {width}x{height}: more than {limits.pixels} pixels")
        if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a photo, with others behind it
            raise PictureError("it is animated")
        if picture.format in ("JPEG", "MPO") and count_scans(data) > MOST_SCANS:
            raise PictureError(f"it has more than {MOST_SCANS} scans")
        try:
            picture.load()
        except Exception:
            raise PictureError(BROKEN) from None
        return picture


def count_scans(data: bytes) -> int:
    """How many scans the first picture of a JPEG file has: a decoder goes through the whole picture for each."""
    at, scans = 2, 0
    while at + 4 <= len(data):
        marker = _JPEG_MARKER.search(data, at)
        if marker is None or marker[1] == b"\xd9":  # the picture's end
            break
        at = marker.end()
        if b"\xd0" <= marker[1] <= b"\xd8" or marker[1] == b"\x01":  # these have no segment behind them
            continue
        scans += marker[1] == b"\xda"
        at += int.from_bytes(data[at : at + 2], "big")
    return scans


def media_type(data: bytes) -> str:
    """Of a file that `read_picture` has taken, by its first bytes."""
    kind = "png" if data.startswith(b"\x89PNG") else "webp" if data.startswith(b"RIFF") else "jpeg"
    return MEDIA_TYPES[kind]


def write_picture(picture: Image.Image, kind: str, quality: int | None = None) -> bytes:
    """Encode as "png", "jpeg" or "webp"; `quality` (0 to 100) is for the latter two."""
    buffer = io.BytesIO()
    if kind == "png":
        picture.save(buffer, "PNG")
    else:
        picture.convert("RGB").save(buffer, kind.upper(), quality=95 if quality is None else quality)
    return buffer.getvalue()
