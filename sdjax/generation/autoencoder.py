"""Pictures to latents and back, in tiles where a picture is large."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sdjax.devices.rows import one_at_a_time
from sdjax.devices.target import precision
from sdjax.generation.tiling import in_tiles
from sdjax.models import Definition, Params, bind

PIXELS_AT_ONCE = 2**20
"""Pixels whose encoding or decoding may hold memory at one time; the rest of a batch follows."""


def encode(definition: Definition, params: Params, pictures: ArrayLike, tile: int | None = None) -> Array:
    """Turn pictures into latents, the means of the autoencoder's posteriors, as many at once as memory allows.

    Args:
        definition: static.
        params: of the whole checkpoint.
        pictures: (batch, height, width, 3) in 0..1, sides multiples of f.
        tile: side, in latents, of the tiles that are encoded one after another; None encodes a picture whole.

    Returns:
        (batch, height / f, width / f, channels) float32, scaled as the denoiser has them.
    """
    config = definition.vae_config
    pictures = 2 * jnp.asarray(pictures, jnp.float32) - 1
    at_once = encoded_at_once(definition, pictures)
    with precision(definition.dtype):
        vae = bind(definition.vae, params["vae"])
        coded = in_tiles(lambda x: vae.encode(x).mean, tile, config.factor, 1)
        means: Array = one_at_a_time(coded, pictures, definition.target, at_once)
    return means * config.scaling_factor


def decode(definition: Definition, params: Params, latents: ArrayLike, tile: int | None = None) -> Array:
    """Turn latents into pictures, as many at once as a fixed bound on memory allows.

    Args:
        definition: static.
        params: of the whole checkpoint.
        latents: (batch, height, width, channels), scaled as the denoiser has them.
        tile: side, in latents, of the tiles that are decoded one after another, overlapping by a quarter and blended;
            memory stops growing with the picture there. An autoencoder's norms look at a whole picture, so tiles differ
            a little from it. None decodes a picture whole.

    Returns:
        (batch, height * f, width * f, 3) float32 in 0..1; NaN where the latents are.
    """
    config = definition.vae_config
    latents = jnp.asarray(latents, jnp.float32) / config.scaling_factor
    at_once = decoded_at_once(definition, latents)
    with precision(definition.dtype):
        vae = bind(definition.vae, params["vae"])
        decoded = in_tiles(vae.decode, tile, 1, config.factor)
        pictures = one_at_a_time(decoded, latents, definition.target, at_once)
    return jnp.clip(pictures / 2 + 0.5, 0.0, 1.0)


def encoded_at_once(definition: Definition, pictures: ArrayLike) -> int:
    """Count the pictures of this size that are encoded at once."""
    height, width = np.shape(pictures)[1:3]
    return max(1, PIXELS_AT_ONCE // int(height * width))


def decoded_at_once(definition: Definition, latents: ArrayLike) -> int:
    """Count the latents of this size that are decoded at once."""
    height, width = np.shape(latents)[1:3]
    return max(1, PIXELS_AT_ONCE // int(height * width * definition.vae_config.factor**2))
