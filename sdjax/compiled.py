"""The functions of `sdjax.generation` as compiled programs, which all pipelines share: each takes rows of a batch."""

from functools import partial
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from sdjax import generation
from sdjax.batch import Batch, Conditioning, batch_axes
from sdjax.generation import decoded_at_once, encoded_at_once
from sdjax.models import Definition
from sdjax.sharding import SHARED, alike, by_rows

LATENTS_AT_ONCE = 2**14
"""Latents whose denoising may hold memory at one time on a CPU; the rest of a batch follows."""


def denoised_at_once(definition: Definition, cond: Conditioning, state: ArrayLike, *_: Any) -> int:
    """How many rows of such a batch a CPU may denoise beside each other."""
    height, width = np.shape(state)[2:4]
    return max(1, LATENTS_AT_ONCE // int(height * width))


encode_prompt = by_rows(
    generation.encode_prompt,
    lambda tokens, vectors, skipped: (alike(1, tokens), alike(SHARED, vectors), 1),
    reads=lambda definition: [name for name, _ in definition.text_encoders],
    out_axis=1,
)
denoise = by_rows(
    generation.denoise,
    lambda *batch: tuple(batch_axes(Batch(*batch))),
    reads=lambda definition: ["unet", *(name for name, _ in definition.controlnets)],
    at_once=denoised_at_once,
    static_argnames=("guidance_axis",),
    donated=(1,),
)
_coded = partial(by_rows, axes=lambda _: (0,), reads=lambda _: ["vae"], static_argnames=("tile",))
encode = _coded(generation.encode, at_once=encoded_at_once)
decode = _coded(generation.decode, at_once=decoded_at_once)
