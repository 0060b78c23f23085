"""What a picture starts from: an input fitted to the model's size, the part of it to repaint, and pasting that back."""

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageFilter

from sdjax.errors import Warn, warn_caller
from sdjax.images import Pixels, to_mask, to_rgb

Size: TypeAlias = tuple[int, int]
"""(width, height) in pixels."""
Plane = TypeVar("Plane", Pixels, NDArray[np.float32])


class Box(NamedTuple):
    """A region in pixels: from (left, top) up to (right, bottom)."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Canvas:
    """A picture to start from.

    Attributes:
        whole: (height, width, 3) uint8, the picture that the result is pasted into.
        paste: (height, width) float32 in 0..1, how much of the result covers each of its pixels.
        box: the region of `whole` that the model works on.
        pixels: (height', width', 3) uint8, that region at the model's size.
        mask: (height', width') float32 in 0..1, 1 where it is repainted.
    """

    whole: Pixels
    paste: NDArray[np.float32]
    box: Box
    pixels: Pixels
    mask: NDArray[np.float32]


def canvas(
    image: Image.Image | ArrayLike,
    mask: Image.Image | ArrayLike | None,
    *,
    size: tuple[int | None, int | None],
    multiple: int,
    largest: int,
    padding: int | None = None,
    feather: float = 0.0,
    warn: Warn = warn_caller,
) -> Canvas:
    """Fit a picture, and the mask over it.

    The size is (width, height) where given, else the picture's own, made smaller where a side is beyond `largest`, each
    side rounded down to a multiple of `multiple`. The picture is scaled until it covers that size and cropped around
    its centre; one that has the size already stays as it is, to the byte. A mask of another size than its picture is
    stretched over the picture first, and then scaled and cropped with it.

    Args:
        image: what `sdjax.images.to_rgb` reads.
        mask: what `sdjax.images.to_mask` reads; None repaints all, and pastes nothing back.
        size: wanted (width, height); None is the picture's own.
        multiple: of the model.
        largest: side allowed.
        padding: work on the masked region alone, at the whole size, with this many pixels of the picture around it.
        feather: pixels over which the result fades in, inside the mask's border.
        warn: called with what of the picture is not used.

    Raises:
        RequestError: it is no picture, or too small.
    """
    pixels = to_rgb(image, warn=warn)
    height, width = pixels.shape[:2]
    shrink = min(1.0, largest / max(height, width))
    target_width, target_height = (
        wanted or max(int(side * shrink) // multiple * multiple, multiple)
        for wanted, side in zip(size, (width, height), strict=True)
    )
    target = (target_width, target_height)
    if mask is None:
        fitted = _covered(pixels, target, Image.Resampling.LANCZOS)
        everything = np.ones(fitted.shape[:2], np.float32)
        return Canvas(fitted, everything, Box(0, 0, *target), fitted, everything)
    painted = _stretched(to_mask(mask), (width, height))
    if padding is None:
        pixels = _covered(pixels, target, Image.Resampling.LANCZOS)
        painted = _covered_mask(painted, target)
        box = Box(0, 0, *target)
        return Canvas(pixels, _feathered(painted, feather), box, pixels, painted)
    box = _region(painted, padding, target)
    region = (slice(box.top, box.bottom), slice(box.left, box.right))
    return Canvas(
        whole=pixels,
        paste=_feathered(painted, feather),
        box=box,
        pixels=_stretched(pixels[region], target),
        mask=_stretched(painted[region], target),
    )


def untouched(canvas: Canvas) -> Canvas:
    """The same canvas with nothing of the result pasted: what strength 0 means."""
    return replace(canvas, paste=np.zeros_like(canvas.paste))


def pasted(canvas: Canvas, result: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lay the model's picture into the whole one: pixels that the mask keeps equal the input's exactly.

    Args:
        canvas: what the picture started from.
        result: (height', width', 3) in 0..1.

    Returns:
        (height, width, 3) float32 in 0..1.
    """
    whole = canvas.whole.astype(np.float32) / np.float32(255)
    left, top, right, bottom = canvas.box
    region = (slice(top, bottom), slice(left, right))
    share = canvas.paste[region][..., None]
    result = _stretched(np.asarray(result, np.float32), (right - left, bottom - top))
    whole[region] = np.where(share > 0, share * result + (1 - share) * whole[region], whole[region])
    return whole


def latent_mask(mask: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Bring a mask to the latents' size, (height, width, 1): a latent is painted as much as any pixel of it is."""
    height, width = mask.shape
    blocks = mask.reshape(height // factor, factor, width // factor, factor)
    latents: NDArray[np.float32] = blocks.max((1, 3))[..., None]
    return latents


def _region(mask: NDArray[np.float32], padding: int, target: Size) -> Box:
    """The masked part with some surroundings, in the proportions of the target where the picture has room for it."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return Box(0, 0, width, height)
    spans = []
    for found, limit in ((columns, width), (rows, height)):
        spans.append((max(int(found[0]) - padding, 0), min(int(found[-1]) + 1 + padding, limit)))
    (left, right), (top, bottom) = spans
    ratio = target[0] / target[1]
    wide, tall = max(right - left, (bottom - top) * ratio), max(bottom - top, (right - left) / ratio)
    left, right = _widened(left, right, round(wide), width)
    top, bottom = _widened(top, bottom, round(tall), height)
    return Box(left, top, right, bottom)


def _widened(low: int, high: int, wanted: int, limit: int) -> tuple[int, int]:
    wanted = min(max(wanted, high - low), limit)
    low = min(max(low - (wanted - (high - low)) // 2, 0), limit - wanted)
    return low, low + wanted


def _feathered(mask: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    """Fade towards the inside of the border, so that nothing outside the mask is touched."""
    if radius <= 0:
        return mask
    levels = Image.fromarray(np.round(mask * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(radius))
    faded: NDArray[np.float32] = mask * np.clip(np.asarray(levels, np.float32) / np.float32(127.5) - 1, 0, 1)
    return faded


def _covered(pixels: Pixels, size: Size, resampling: Image.Resampling) -> Pixels:
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, resampling, box=_crop(pixels.shape, size)))


def _covered_mask(mask: NDArray[np.float32], size: Size) -> NDArray[np.float32]:
    if (mask.shape[1], mask.shape[0]) == size:
        return mask
    resized = Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR, box=_crop(mask.shape, size))
    return np.clip(np.asarray(resized, np.float32), 0, 1)


def _crop(shape: tuple[int, ...], size: Size) -> tuple[float, float, float, float]:
    """The largest region around the centre that has the proportions of `size` (width, height)."""
    height, width = shape[:2]
    scale = min(width / size[0], height / size[1])
    # Rounding must not take the region a last bit out of the picture: Pillow refuses that.
    wide, tall = min(size[0] * scale, width), min(size[1] * scale, height)
    left, top = (width - wide) / 2, (height - tall) / 2
    return left, top, min(left + wide, width), min(top + tall, height)


def _stretched(array: Plane, size: Size) -> Plane:
    """Resize (height, width[, 3]) bytes, or floats in 0..1, to (width, height)."""
    if (array.shape[1], array.shape[0]) == size:
        return array
    if array.dtype == np.uint8:
        enlarged: Plane = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))
        return enlarged
    channels = np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
    resized = [np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR)) for channel in channels]
    stacked: Plane = np.clip(np.stack(resized, axis=-1), 0, 1).astype(array.dtype)
    return stacked if array.ndim == 3 else stacked[..., 0]
