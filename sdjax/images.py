"""Pictures: read in whatever mode they come, and written."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps

from sdjax.errors import RequestError, Warn, warn_caller

Pixels: TypeAlias = NDArray[np.uint8]
"""(height, width, 3), red, green and blue of 0..255."""
LEAST_WHITE = 32
"""The brightest value of a mask of several levels is at least this."""


def open_picture(file: Path) -> Image.Image:
    """Read a picture from a file.

    Raises:
        RequestError: there is none, or it can't be read.
    """
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except FileNotFoundError as error:
        raise RequestError(f"there is no file {str(file)!r}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{str(file)!r} is not a picture that can be read: {error}") from error


def to_rgb(picture: Image.Image | ArrayLike, *, name: str = "image", warn: Warn = warn_caller) -> Pixels:
    """Read a picture's colours, upright.

    EXIF orientation is applied first. What has transparency is laid on white, with a warning. 16 bits a channel become
    8 by leaving out the lower ones. Arrays are (height, width[, 1, 3 or 4]), bytes, or floats in 0..1.

    Raises:
        RequestError: it is no picture.
    """
    image = _eight_bits(_upright(_opened(picture, name)))
    if "A" in image.getbands():
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            warn(f"{name} has transparent parts; they are laid on white")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def to_mask(mask: Image.Image | ArrayLike, *, name: str = "mask") -> NDArray[np.float32]:
    """Read a mask: (height, width) in 0..1, 1 (white) where the picture is repainted.

    A mask's value is its brightness times its opacity: what is transparent is kept, like what is black. Where the
    brightness has two values, and one is 0, the other is white, whatever number or colour stands for it: 0 and 1 of a
    segmentation model, of any type of whole numbers. Booleans, and floats in 0..1, mean what they are.

    Raises:
        RequestError: it is no picture; nothing but its transparency says which part is meant, for tools differ in what
            transparent means; or it is so dark that its values may be labels.
    """
    if not isinstance(mask, Image.Image):
        array = np.asarray(mask)
        if np.issubdtype(array.dtype, np.floating):
            return np.asarray(_opened(array, name).convert("L"), np.float32) / np.float32(255)
        mask = _two_valued(array) if np.issubdtype(array.dtype, np.integer) else array
    image = _upright(_opened(mask, name))
    if image.mode.startswith("I"):
        image = _opened(_two_valued(np.asarray(image)), name) if _has_two_values(np.asarray(image)) else image
    image = _eight_bits(image)
    if "A" not in image.getbands():
        return _whites(image.convert("L"), name)
    rgba = image.convert("RGBA")
    alpha = np.asarray(rgba.getchannel("A"), np.float32) / np.float32(255)
    white = _whites(rgba.convert("RGB").convert("L"), name) * alpha
    if alpha.min() < 1 and not white.any():
        raise RequestError(
            f"{name} is black wherever it is not transparent, so only its transparency says which part is meant, and "
            "tools differ in what that is; give a mask that is white where the picture is to be repainted"
        )
    return white


def _has_two_values(values: NDArray[Any]) -> bool:
    """Whether whole numbers are 0 and one other, or 0 or 1 alone."""
    found = np.unique(values)
    return found.tolist() in ([0], [1]) or (len(found) == 2 and found[0] == 0)


def _two_valued(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers as booleans, where they are 0 and one other; all else as it is."""
    return values > 0 if _has_two_values(values) else values


def _whites(grey: Image.Image, name: str) -> NDArray[np.float32]:
    """A mask's brightness in 0..1, white where there is black and one other level."""
    levels = _two_valued(np.asarray(grey))
    if levels.dtype == np.bool_:
        return levels.astype(np.float32)
    brightest = levels.max()
    if 0 < brightest < LEAST_WHITE:
        raise RequestError(
            f"{name} is almost black: its brightest value is {brightest} of 255, so its values may be labels; give a "
            "mask of 0 and 255, of booleans, or of floats in 0..1"
        )
    return levels.astype(np.float32) / np.float32(255)


def _opened(picture: Image.Image | ArrayLike, name: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        if not all(picture.size):
            raise RequestError(f"{name} has no pixels: it is {picture.width}x{picture.height}")
        return picture
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise RequestError(
            f"{name} must be a PIL image or an array (height, width[, 1, 3 or 4]), not "
            + (f"an array of shape {array.shape}" if array.dtype != object else f"a {type(picture).__name__}")
        )
    if array.dtype == np.uint8 and array.max() == 1:
        raise RequestError(f"{name} is an array of bytes that are 0 and 1 alone; give 0 and 255, or booleans")
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise RequestError(f"{name} is an array of floats, which must lie in 0..1")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise RequestError(f"{name} is an array of {array.dtype}; bytes, or floats in 0..1, are read")
    return Image.fromarray(array)


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) or image


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same picture with 8 bits a channel, palettes resolved, transparency in a channel of its own."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        # Pillow reads some 16-bit files as 32-bit numbers, and hands out 8-bit ones, and floats in 0..1, in that mode.
        values: NDArray[Any] = np.asarray(image)
        scale = (
            1 / 256 if values.max(initial=0) > 255 else 255 if image.mode == "F" and values.max(initial=0) <= 1 else 1
        )
        return Image.fromarray(np.clip(np.nan_to_num(values) * scale, 0, 255).astype(np.uint8))
    if image.mode == "P" or "transparency" in image.info:
        has_alpha = "transparency" in image.info
        return image.convert("RGBA" if has_alpha else "RGB")
    return image.convert("RGBA") if image.mode in ("La", "RGBa", "PA") else image


def to_pil(pictures: NDArray[np.float32]) -> list[Image.Image]:
    """Turn (batch, height, width, 3) floats in 0..1 into pictures, each channel rounded to 256 levels."""
    levels = np.round(pictures * 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in levels]


def to_png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()


def to_html(pictures: Sequence[Image.Image], captions: Sequence[str]) -> str:
    """A row of pictures with captions, each inlined as a PNG: what a notebook shows."""
    figures = []
    for picture, caption in zip(pictures, captions, strict=True):
        source = "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()
        said = html.escape(caption)
        figures.append(
            f'<figure style="display:inline-block;margin:4px"><img src="{source}" alt="{said}">'
            f"<figcaption>{said}</figcaption></figure>"
        )
    return "".join(figures)
