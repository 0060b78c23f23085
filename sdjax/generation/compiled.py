"""The functions of `sdjax.generation` as compiled programs, which all pipelines share."""

from functools import partial
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from sdjax.devices.rows import alike, jit_rows
from sdjax.devices.sharding import SHARED
from sdjax.generation import autoencoder, loop, text
from sdjax.generation.batch import Batch, Conditioning, batch_axes
from sdjax.models import Definition

LATENTS_AT_ONCE = 2**14
"""Latents whose denoising may hold memory at one time on a CPU; the rest of a batch follows."""


def denoised_at_once(definition: Definition, cond: Conditioning, state: ArrayLike, *_: Any) -> int:
    """Count the rows of such a batch that a CPU may denoise beside each other."""
    height, width = np.shape(state)[2:4]
    return max(1, LATENTS_AT_ONCE // int(height * width))


encode_prompt = jit_rows(
    text.encode_prompt,
    lambda tokens, vectors, skipped: (alike(1, tokens), alike(SHARED, vectors), 1),
    reads=lambda definition: [name for name, _ in definition.text_encoders],
    out_axis=1,
)
denoise = jit_rows(
    loop.denoise,
    lambda *batch: tuple(batch_axes(Batch(*batch))),
    reads=lambda definition: definition.networks,
    at_once=denoised_at_once,
    static_argnames=("guidance_axis",),
    donated=(1,),
)
_coded = partial(jit_rows, axes=lambda _: (0,), reads=lambda _: ["vae"], static_argnames=("tile",))
encode = _coded(autoencoder.encode, at_once=autoencoder.encoded_at_once)
decode = _coded(autoencoder.decode, at_once=autoencoder.decoded_at_once)
