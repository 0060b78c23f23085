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
    """Show the VAE smooth noise in place of a row's latents, and fit what it makes of it."""
    height, width, channels = row.request.latent_shape
    coarse = np.random.default_rng(0).standard_normal((height // 4 + 1, width // 4 + 1, channels))
    smooth = coarse.repeat(4, 0).repeat(4, 1)[None, :height, :width].astype(np.float32)
    (picture,) = pipe.finish(row.request, jnp.asarray(smooth))
    return fit_projection(smooth, np.asarray(picture, np.float32)[None] / np.float32(255))
