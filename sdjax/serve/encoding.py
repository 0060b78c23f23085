"""Finished pictures as files, and unfinished ones as previews."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdjax import metadata


class Projection(NamedTuple):
    """The linear map from latents to colours that comes closest to a VAE: good enough for a preview, and free.

    weights: (channels + 1, 3) float32, the last row constant.
    """

    weights: NDArray[np.float32]

    def picture(self, latents: NDArray[np.float32]) -> Image.Image:
        """A small picture, one pixel for each of the latents (height, width, channels)."""
        ones = np.ones((*latents.shape[:2], 1), np.float32)
        colors = np.concatenate([latents, ones], axis=-1) @ self.weights
        return Image.fromarray(np.round(np.nan_to_num(colors).clip(0, 1) * 255).astype(np.uint8))


def fit_projection(latents: NDArray[np.float32], pictures: NDArray[np.float32]) -> Projection:
    """Fit it by least squares.

    Args:
        latents: (samples, height, width, channels).
        pictures: (samples, height * f, width * f, 3) in 0..1, what the VAE makes of them.
    """
    samples, height, width, channels = latents.shape
    factor = pictures.shape[1] // height
    colors = pictures.reshape(samples, height, factor, width, factor, 3).mean((2, 4))
    inputs = np.concatenate([latents, np.ones((samples, height, width, 1), np.float32)], axis=-1)
    weights = np.linalg.lstsq(inputs.reshape(-1, channels + 1), colors.reshape(-1, 3), rcond=None)[0]
    return Projection(weights.astype(np.float32))


def encode(
    picture: Image.Image, kind: str, prompt: str, negative_prompt: str | None, settings: Mapping[str, Any]
) -> bytes:
    """A picture as the bytes of a file, with the parameters that it was made with.

    Args:
        picture: in RGB.
        kind: "png", "jpeg" or "webp".
        prompt: for the parameters, likewise the negative prompt.
        settings: the others, see `sdjax.metadata.to_text`.
    """
    file = io.BytesIO()
    metadata.save(picture, file, kind, prompt, negative_prompt, settings)
    return file.getvalue()
