"""The bundled model's own sizes, read from its configs, so that tests hold for whatever model is bundled."""

import json

from sdjax.pipeline import BUNDLED_FOLDER

_UNET, _VAE = (json.loads((BUNDLED_FOLDER / part / "config.json").read_text()) for part in ("unet", "vae"))

FACTOR = 2 ** (len(_VAE["block_out_channels"]) - 1)
"""Pixels along a side of a latent."""
LATENT = (_UNET["sample_size"], _UNET["sample_size"], _UNET["in_channels"])
"""Height, width and channels of the latents of a picture of the model's own size."""
SIDE = FACTOR * _UNET["sample_size"]
"""Pixels along a side of such a picture."""
