"""What an engine compiles and measures before it takes jobs."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax.pipeline import Pipeline
from sdjax.serve import drawing
from sdjax.serve.drawing import Row
from sdjax.serve.encoding import Projection, fit_projection

SAMPLES, PATCH, SPREAD = 4, 4, 0.7
"""Noise of one value in patches as wide as parts of a picture, and a little tamer than latents: of several widths and
spreads, what the bundled model's pictures were guessed best from."""


def foreseen(pipe: Pipeline, sizes: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """One row of every kind that jobs will have; making it compiles what prepares the like, from words or pictures.

    Args:
        pipe: draws them.
        sizes: (width, height) in pixels.
    """
    inpaints = pipe.definition.unet_config.in_channels != pipe.definition.vae_config.latent_channels
    for width, height in sizes:
        painted: dict[str, Any] = {
            "image": Image.new("RGB", (width, height), "gray"),
            "mask": Image.new("L", (width, height), "white"),
            "strength": 1.0,
        }
        for guidance_scale in (0.0, 2.0):
            for given in [painted] if inpaints else [painted, {}]:
                request = pipe.resolve(
                    "", "", guidance_scale=guidance_scale, steps=2, seed=0, width=width, height=height, **given
                )
                row = drawing.prepare(pipe, "", 0, request)
            yield row


def projection(pipe: Pipeline, row: Row) -> Projection:
    """Show the VAE patches of noise in place of a row's latents, and fit what it makes of them."""
    height, width, channels = row.request.latent_shape
    coarse = (SAMPLES, height // PATCH + 1, width // PATCH + 1, channels)
    patches = SPREAD * np.random.default_rng(0).standard_normal(coarse).astype(np.float32)
    latents = patches.repeat(PATCH, 1).repeat(PATCH, 2)[:, :height, :width]
    pictures = [np.asarray(pipe.finish(row.request, jnp.asarray(sample[None]))[0], np.float32) for sample in latents]
    return fit_projection(latents, np.stack(pictures) / np.float32(255))
