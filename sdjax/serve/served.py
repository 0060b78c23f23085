"""What the front knows of the model that is served: enough to check a request and to fill in its defaults."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from sdjax.limits import JOB_LEAST_SIDE, MAX_SIDE
from sdjax.requests import Request
from sdjax.schedulers import default_sampler
from sdjax.variants import VARIANTS

if TYPE_CHECKING:
    from sdjax import Pipeline

SD_VERSIONS: Mapping[str, str] = MappingProxyType(
    {
        "v1-5": "sd-v1-5",
        "v1-5-inpaint": "sd-v1-5-inpaint",
        "v2-1": "sd-v2-1",
        "v2-inpaint": "sd-v2-inpaint",
        "xl": "sd-xl",
        "xl-inpaint": "sd-xl-inpaint",
        "turbo": "sdxl-turbo",
    }
)
"""The worker's names for published checkpoints, by `sdjax.variants`."""
Check: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Image.Image]], Request]


@dataclass(frozen=True)
class ServedModel:
    """The model behind this worker.

    Attributes:
        name: what it is called in answers.
        aliases: other names by which a request may ask for it.
        steps: where a request names none; `guidance_scale` and `sampler` likewise.
        size: of the pictures that it was trained on, in pixels: the longer side.
        needs_mask: it was trained for inpainting, and does nothing else.
        check: resolves a request with every default filled in, and its pictures by name, as the library does, whose
            `warnings` are the job's; it raises a RequestError, and draws nothing.
        most_pixels: the largest area of a picture that it is asked for.
    """

    name: str
    aliases: frozenset[str]
    steps: int
    guidance_scale: float
    sampler: str
    size: int
    needs_mask: bool
    check: Check
    native_size: tuple[int, int] | None = None
    """(width, height) of the pictures that it was trained on; None is `size` for both."""
    most_pixels: int = MAX_SIDE**2

    @property
    def least_side(self) -> int:
        """The smallest side of a picture that it is asked for."""
        return min(JOB_LEAST_SIDE, *(self.native_size or (self.size,)))

    def side(self, name: str) -> int:
        """The "width" or "height" of pictures of which none is asked for."""
        width, height = self.native_size or (self.size, self.size)
        return width if name == "width" else height


def served_model(
    pipe: "Pipeline", sd_version: str | None, most_pixels: Callable[[int], int] = lambda area: MAX_SIDE**2
) -> ServedModel:
    """Describe a loaded pipeline.

    Args:
        pipe: the model.
        sd_version: what its weights are, where a path doesn't show it.
        most_pixels: the largest area of a picture, from that of those that it was trained on.
    """
    variant = VARIANTS[SD_VERSIONS[sd_version]] if sd_version else None
    known = VARIANTS.get(pipe.name)
    native = pipe.definition.native_size
    names = {pipe.name, sd_version, SD_VERSIONS.get(sd_version or ""), variant and variant.source}
    names.add(known.source if known else None)
    return ServedModel(
        name=sd_version or pipe.name,
        aliases=frozenset(name for name in names if name),
        steps=variant.steps if variant else pipe.steps,
        guidance_scale=variant.guidance_scale if variant else pipe.guidance_scale,
        sampler=default_sampler(pipe.checkpoint.scheduler),
        size=max(native),
        native_size=native,
        needs_mask=pipe.definition.inpaints,
        check=partial(_check, pipe),
        most_pixels=most_pixels(math.prod(native)),
    )


def _check(pipe: "Pipeline", request: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> Request:
    given: dict[str, Any] = {
        name: request.get(name)
        for name in ("steps", "guidance_scale", "sampler", "schedule", "seed", "width", "height")
    }
    if pictures:
        given["strength"] = request["strength"]
        given["mask"] = pictures.get("mask_image")
        given["image"] = next(picture for name, picture in pictures.items() if name != "mask_image")
    given["loras"] = [(lora["path"], lora["strength"]) for lora in request["loras"]]
    return pipe.resolve(request["prompt"], request["negative_prompt"], **given)
