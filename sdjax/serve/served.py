"""What the front knows of the model that is served: enough to check a request and to fill in its defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from sdjax.errors import RequestError
from sdjax.schedulers import SchedulerConfig, default_sampler, table
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
        "turbo": "sd-turbo",
    }
)
"""The worker's names for published checkpoints, by `sdjax.variants`."""
LEAST_SIDE, MOST_SIDE, MULTIPLE = 256, 2048, 8


@dataclass(frozen=True)
class ServedModel:
    """The model behind this worker.

    Attributes:
        name: what it is called in answers.
        aliases: other names by which a request may ask for it.
        steps: where a request names none; `guidance_scale` and `sampler` likewise.
        size: of the pictures that it was trained on, in pixels.
        scheduler: its scheduler's config.
        needs_mask: it was trained for inpainting, and does nothing else.
    """

    name: str
    aliases: frozenset[str]
    steps: int
    guidance_scale: float
    sampler: str
    size: int
    scheduler: SchedulerConfig
    needs_mask: bool

    @property
    def least_side(self) -> int:
        """The smallest side of a picture that it is asked for."""
        return min(LEAST_SIDE, self.size)

    def check_sampler(self, sampler: str, steps: int) -> None:
        """See whether the sampler can take so many steps with this model.

        Raises:
            RequestError: it can't.
        """
        try:
            table(sampler, self.scheduler, steps)
        except ValueError as error:
            raise RequestError(str(error)) from error


def served_model(pipe: "Pipeline", sd_version: str | None) -> ServedModel:
    """Describe a loaded pipeline; `sd_version` says what its weights are, where a path doesn't."""
    variant = VARIANTS[SD_VERSIONS[sd_version]] if sd_version else None
    known = VARIANTS.get(pipe.name)
    unet, vae = pipe.definition.unet_config, pipe.definition.vae_config
    names = {pipe.name, sd_version, SD_VERSIONS.get(sd_version or ""), variant and variant.source}
    names.add(known.source if known else None)
    return ServedModel(
        name=sd_version or pipe.name,
        aliases=frozenset(name for name in names if name),
        steps=variant.steps if variant else pipe.steps,
        guidance_scale=variant.guidance_scale if variant else pipe.guidance_scale,
        sampler=default_sampler(pipe.checkpoint.scheduler),
        size=unet.sample_size * vae.factor,
        scheduler=pipe.checkpoint.scheduler,
        needs_mask=unet.in_channels == 2 * vae.latent_channels + 1,
    )
