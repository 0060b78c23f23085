"""The pictures that a request comes with: what to start from, and what ControlNets are to see."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdjax.canvas import Canvas, canvas
from sdjax.checks import finite, share, whole
from sdjax.errors import RequestError, Warn, warn_caller
from sdjax.generation import PIXELS_AT_ONCE
from sdjax.images import to_rgb
from sdjax.limits import MAX_SIDE
from sdjax.loading import Part, as_part
from sdjax.models import Definition


class ControlInput(NamedTuple):
    """What one ControlNet is to make of one picture.

    Attributes:
        model: its folder, a .safetensors file, the id of a repository on the hub, or a `Part`, which has a variant and
            a revision too.
        image: the picture, in the colours that it was trained to read.
        scale: how much it says; 0 is nothing.
        start: the share of the steps, 0 to 1, before which it is silent.
        end: likewise, after which.
        guess: let it speak where there is a prompt alone, and the less the higher the resolution.
    """

    model: str | Path | Part
    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False


class Steering(NamedTuple):
    """A checked `ControlInput`; `pixels` (height, width, 3) uint8 have the picture's size."""

    model: Part
    pixels: NDArray[np.uint8]
    scale: float
    start: float
    end: float
    guess: bool


def canvases_of(definition: Definition, given: Mapping[str, Any], prompts: int, *, warn: Warn) -> list[Canvas]:
    """What the pictures start from: one canvas a prompt, or none.

    Args:
        definition: of the checkpoint, which may be one for inpainting.
        given: the arguments of the call.
        prompts: how many there are.
        warn: called with what of a picture is not used.

    Raises:
        RequestError: a picture or mask can't be read, is missing, or one too many.
    """
    images, masks = _each("image", given.get("image"), prompts), _each("mask", given.get("mask"), prompts)
    if definition.inpaints and any(picture is None for picture in (*images, *masks)):
        raise RequestError("this is an inpainting checkpoint: give image= and mask=")
    padding = given.get("padding_mask_crop")
    if padding is not None:
        padding = whole("padding_mask_crop", padding, 0, None)
    feather = finite("feather", given.get("feather", 0.0))
    if feather < 0:
        raise RequestError(f"feather must be at least 0 pixels, not {feather:g}")
    if images[0] is None:
        for name in ("mask", "padding_mask_crop"):
            if given.get(name) is not None:
                raise RequestError(f"{name} needs a picture: give image=")
        return []
    if given.get("denoising_start") is not None:
        raise RequestError("give image= with strength=, or latents= with denoising_start=, not both")
    multiple = definition.multiple
    sides = [given.get(name) for name in ("width", "height")]
    size = tuple(
        None if side is None else _side(n, side, multiple) for n, side in zip(("width", "height"), sides, strict=True)
    )
    made = [
        canvas(
            image,
            mask,
            size=size,  # type: ignore[arg-type]
            multiple=multiple,
            largest=MAX_SIDE,
            padding=padding if mask is not None else None,
            feather=feather,
            warn=warn,
        )
        for image, mask in zip(images, masks, strict=True)
    ]
    sizes = {entry.pixels.shape[:2] for entry in made}
    if len(sizes) > 1:
        raise RequestError(f"the pictures have {len(sizes)} sizes, and a batch has one: give width= and height=")
    if given.get("output") == "numpy" and len({entry.whole.shape for entry in made}) > 1:
        raise RequestError("pictures of different sizes do not make one array: take output='pil'")
    return made


def _each(name: str, value: Any, prompts: int) -> list[Any]:
    """One picture for all prompts, or a list with one for each."""
    if not isinstance(value, list | tuple):
        return [value] * prompts
    if len(value) == 1:
        return list(value) * prompts
    if len(value) != prompts:
        raise RequestError(f"{name} has {len(value)} pictures for {prompts} prompts: give one, or one for each")
    return list(value)


def size_of(definition: Definition, given: Mapping[str, Any], canvases: Sequence[Canvas]) -> tuple[int, int]:
    """(width, height) in pixels: the canvases', what is asked for, or what the model was trained on."""
    if canvases:
        height, width = canvases[0].pixels.shape[:2]
        return width, height
    width, height = (
        _side(name, native if (side := given.get(name)) is None else side, definition.multiple)
        for name, native in zip(("width", "height"), definition.native_size, strict=True)
    )
    return width, height


def _side(name: str, value: object, multiple: int) -> int:
    side = whole(name, value, multiple, MAX_SIDE)
    if side % multiple:
        low = side - side % multiple
        raise RequestError(
            f"{name} must be a multiple of {multiple}, not {side}: {low} and {low + multiple} are nearest"
        )
    return side


def tile_of(
    definition: Definition, tiling: bool | None, size: tuple[int, int], *, warn: Warn = warn_caller
) -> int | None:
    """The side of the autoencoder's tiles: that of a square of as many pixels as it may hold at one time."""
    if tiling is None:
        tiling = size[0] * size[1] > PIXELS_AT_ONCE
        if tiling:
            warn(
                f"a picture of {size[0]}x{size[1]} is encoded and decoded in tiles, to save memory; "
                "tiling=True or False chooses without this warning"
            )
    return math.isqrt(PIXELS_AT_ONCE) // definition.vae_config.factor if tiling else None


def controls_of(given: Sequence[Any], size: tuple[int, int], *, warn: Warn) -> tuple[Steering, ...]:
    """What ControlNets are to see, their pictures stretched to (width, height)."""
    checked = []
    for i, entry in enumerate(given):
        name = f"control[{i}]"
        try:
            asked = ControlInput(*entry)
        except TypeError as error:
            raise RequestError(f"{name} must be (model, image, scale[, start, end, guess]), not {entry!r}") from error
        image = asked.image
        start, end = share(f"{name}.start", asked.start), share(f"{name}.end", asked.end)
        if start >= end:
            raise RequestError(f"{name} speaks from {start:g} to {end:g} of the steps, which is never")
        pixels = to_rgb(image, name=f"{name}.image", warn=warn)
        if (pixels.shape[1], pixels.shape[0]) != size:
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
        scale = finite(f"{name}.scale", asked.scale)
        checked.append(Steering(as_part(asked.model, f"{name}.model"), pixels, scale, start, end, bool(asked.guess)))
    return tuple(checked)
