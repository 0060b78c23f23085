"""What a picture will look like, from halfway."""

import logging
from contextlib import suppress

import jax
import numpy as np
from PIL import Image

from sdjax.errors import NotFiniteError
from sdjax.pipeline import Pipeline
from sdjax.serve import drawing
from sdjax.serve.drawing import Row
from sdjax.serve.encoding import Projection, fit_projection

DECODED = 2**16
"""Pixels up to which a preview is what the VAE decodes; of larger pictures it is a linear guess from the latents."""
SAMPLES, PATCH, SPREAD = 4, 4, 0.7
"""The guess is fitted to noise of one value in patches as wide as parts of a picture, and a little tamer than latents:
of several widths and spreads, what the bundled model's pictures were guessed best from."""

logger = logging.getLogger(__name__)


class Previews:
    """The previews of one model."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self._projection: Projection | None = None

    def fit(self, row: Row) -> None:
        """Show the VAE patches of noise in place of a row's latents, and learn what it makes of them, once."""
        if self._projection is None:
            with suppress(NotFiniteError):  # said of each picture, when there is one
                self._projection = projection(self._pipe, row)

    def picture(self, row: Row) -> Image.Image | None:
        """Where the walk is heading; None, and a line in the log, where that can't be shown."""
        estimate = drawing.estimate(row)
        settings = row.request.settings
        try:
            if self._projection is None or settings["width"] * settings["height"] <= DECODED:
                return self._pipe.finish(row.request, estimate)[0]
            return self._projection.picture(np.asarray(estimate[0], np.float32))
        except Exception as error:
            logger.warning("a preview was left out: %s", error, extra={"job": row.job_id})
            return None


def projection(pipe: Pipeline, row: Row) -> Projection:
    """Fit a `Projection` to what the VAE makes of patches of noise, at a row's size."""
    height, width, channels = row.request.latent_shape
    coarse = (SAMPLES, height // PATCH + 1, width // PATCH + 1, channels)
    patches = SPREAD * np.random.default_rng(0).standard_normal(coarse).astype(np.float32)
    latents = patches.repeat(PATCH, 1).repeat(PATCH, 2)[:, :height, :width]
    pictures = [np.asarray(pipe.finish(row.request, jax.device_put(sample[None]))[0], np.float32) for sample in latents]
    return fit_projection(latents, np.stack(pictures) / np.float32(255))
