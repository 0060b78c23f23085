"""Texts inside picture files: where each format keeps them."""

import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, PngImagePlugin

from sdjax.errors import SdjaxError
from sdjax.metadata.infotext import to_text
from sdjax.metadata.tools import from_texts

CHUNK = "parameters"
KINDS = ("png", "jpeg", "webp")
QUALITY = 95
"""Of JPEG and WebP, 0 to 100."""
MOST_IN_A_JPEG = 65_527
"""Bytes of EXIF that one segment of a JPEG file can hold."""
USER_COMMENT, DESCRIPTION = "UserComment", "ImageDescription"
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF")
_CODE_LENGTH = 8
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error)
"""What Pillow raises where a file, or the EXIF block in it, is damaged."""


class MetadataError(SdjaxError, ValueError):
    """A file that is no picture, or holds no text."""


def read(file: Path) -> dict[str, Any]:
    """Read the parameters inside a PNG, JPEG, WebP, AVIF or GIF file.

    Returns:
        As `from_text`. Where no tool's parameters are found: `{"texts": {name: text}}`, all that the file holds.

    Raises:
        MetadataError: it is no readable picture, or has no text in it.
    """
    Image.init()  # or Pillow knows only the commonest formats yet
    try:
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as picture:
            texts = _texts(picture)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise MetadataError(_unreadable(file, error)) from error
    if not texts:
        raise MetadataError(f"{str(file)!r} holds no generation parameters")
    return from_texts(texts) or {"texts": dict(texts)}


def save(
    picture: Image.Image,
    file: BinaryIO,
    kind: str,
    prompt: str,
    negative_prompt: str | None,
    settings: Mapping[str, Any],
) -> None:
    """Write a picture with the parameters that it was made with.

    Args:
        picture: in RGB.
        file: where to.
        kind: of `KINDS`. A PNG has the parameters in a chunk `parameters`; JPEG and WebP in the EXIF field UserComment,
            as other tools with this convention have them.
        prompt: as it was given; the negative prompt likewise.
        settings: as for `to_text`; the size is added.
    """
    text = to_text(prompt, negative_prompt, {**settings, "size": f"{picture.width}x{picture.height}"})
    if kind == "png":
        picture.save(file, "PNG", pnginfo=_chunk(text))
        return
    exif = Image.Exif()
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    exif[ExifTags.IFD.Exif.value] = {ExifTags.Base.UserComment.value: comment}
    block = exif.tobytes()
    if kind == "jpeg" and len(block) > MOST_IN_A_JPEG:
        warnings.warn("the parameters are too long for a JPEG file: this one has none", stacklevel=2)
        block = b""
    picture.save(file, kind.upper(), quality=QUALITY, exif=block)


def _chunk(text: str) -> PngImagePlugin.PngInfo:
    """The text as a PNG's chunk: Latin-1 where it fits, else UTF-8."""
    info = PngImagePlugin.PngInfo()
    try:
        text.encode("latin-1")
        info.add_text(CHUNK, text)
    except UnicodeEncodeError:
        info.add_itxt(CHUNK, text)
    return info


def _unreadable(file: Path, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no file {str(file)!r}"
    if isinstance(error, OSError) and error.strerror:
        return f"{str(file)!r}: {error.strerror}"
    return f"{str(file)!r} is not a readable PNG, JPEG, WebP, AVIF or GIF file"


def _texts(picture: Image.Image) -> dict[str, str]:
    """All texts by the names that the format gives them.

    Raises:
        One of `_BROKEN`: nothing was found, and the file is damaged.
    """
    found: dict[str, Any] = {}
    try:
        if picture.format == "PNG":
            picture.load()  # chunks may stand behind the pixels
        found = _exif_texts(picture)
    except _BROKEN:
        if not any(isinstance(value, str) for value in picture.info.values()):
            raise
    # Named chunks are strings; a JPEG's or GIF's comment is bytes, as are profiles.
    chunks = {str(name): value for name, value in picture.info.items() if isinstance(value, str) or name == "comment"}
    return {name: text for name, value in {**found, **chunks}.items() if (text := _decoded(value)).strip()}


def _exif_texts(picture: Image.Image) -> dict[str, Any]:
    exif = picture.getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    found = {
        USER_COMMENT: _user_comment(comment) if isinstance(comment, bytes) else comment,
        DESCRIPTION: exif.get(ExifTags.Base.ImageDescription),
        "Software": exif.get(ExifTags.Base.Software),
    }
    # ComfyUI writes `name:json` into the fields from "camera model" downwards.
    for tag in (ExifTags.Base.Model, ExifTags.Base.Make, ExifTags.Base.ImageDescription):
        name, colon, text = _decoded(exif.get(tag)).partition(":")
        if colon and text.lstrip().startswith("{") and name.isidentifier():
            found[name] = text
    return found


def _user_comment(value: bytes) -> str:
    """Decode a UserComment: a code of 8 bytes, then the text."""
    code, rest = value[:_CODE_LENGTH], value[_CODE_LENGTH:]
    if code == b"UNICODE\0":
        return _utf_16(rest)
    return _decoded(rest if code in (b"ASCII\0\0\0", bytes(_CODE_LENGTH)) else value)


def _utf_16(value: bytes) -> str:
    """Decode the bytes of a Unicode comment, in the order that its zeros show: tools write either, and some UTF-8."""
    if value.startswith((b"\xff\xfe", b"\xfe\xff")):
        return value.decode("utf-16", "replace")
    high_first, low_first = value[0::2].count(0), value[1::2].count(0)
    if high_first == low_first == 0:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            pass
    return value.decode("utf-16-le" if low_first > high_first else "utf-16-be", "replace")


def _decoded(value: object) -> str:
    """A text, or bytes in UTF-8 or Latin-1; empty for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8").rstrip("\0")
        except UnicodeDecodeError:
            return value.decode("latin-1").rstrip("\0")
    return value.rstrip("\0") if isinstance(value, str) else ""
