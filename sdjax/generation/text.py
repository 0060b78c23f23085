"""Token ids to what the denoiser reads of a text."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from sdjax.devices.rows import one_at_a_time
from sdjax.devices.target import precision
from sdjax.models import Definition, Params, Text, TextPart, bind

MOST_RESCALED = 10.0
"""How far weights may change the scale of a prompt's hidden states, up or down, and have it restored."""


class Tokens(NamedTuple):
    """Prompts for one text encoder, in chunks of its length.

    ids: (..., chunks, length) int32, with an end token in every chunk.
    weights: (..., chunks, length) float32, how much each token counts; 1 is plain.
    """

    ids: Array | NDArray[np.int32]
    weights: Array | NDArray[np.float32]


def encode_prompt(
    definition: Definition,
    params: Params,
    tokens: Sequence[Tokens],
    vectors: Sequence[ArrayLike] | None = None,
    clip_skip: ArrayLike = 0,
) -> Text:
    """Encode token ids.

    Args:
        definition: static.
        params: of the whole checkpoint.
        tokens: for each text encoder; `sdjax.prompts` makes them.
        vectors: for each text encoder (rows, width): the learned words that ids beyond the vocabulary stand for.
        clip_skip: (...) int32, or one for all: layers to leave out at the end, counted as diffusers counts (1 is
            AUTOMATIC1111's 2), less than the encoder has. Out of range it would be clamped without a word.

    Returns:
        The text as the family joins it, the context of a prompt's chunks one after the other: (..., chunks * length,
        channels). Pooled vectors are of the first chunk; `clip_skip` and weights do not change them.
    """
    states, pooled = [], []
    with precision(definition.dtype):
        for i, ((name, encoder), given) in enumerate(zip(definition.text_encoders, tokens, strict=True)):
            ids, weights = jnp.asarray(given.ids), jnp.asarray(given.weights)
            *prompts, chunks, length = ids.shape
            skipped = jnp.broadcast_to(jnp.asarray(clip_skip, jnp.int32)[..., None], (*prompts, chunks))
            learned = None if vectors is None else jnp.asarray(vectors[i])
            part = next(part for part in definition.family.texts if part.component == name)
            read = partial(_read_chunks, bind(encoder, params[name]), learned, part)
            rows = ids.reshape(-1, length), weights.reshape(-1, length), skipped.reshape(-1)
            hidden, at_end = one_at_a_time(read, rows, definition.target)
            states.append(hidden.reshape(*prompts, chunks * length, -1))
            pooled.append(at_end.reshape(*prompts, chunks, -1)[..., 0, :])
    return definition.family.join_texts(states, pooled)


def _read_chunks(
    model: Any, vectors: Array | None, part: TextPart, rows: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """Encode chunks, (batch, length) ids and weights and (batch,) `clip_skip`: weighted states, and pooled vectors."""
    ids, weights, clip_skip = rows
    encoding = model(ids, vectors)
    states = jnp.stack(encoding.hidden_states)
    chosen = states[len(states) - 1 - part.skipped_layers - clip_skip, jnp.arange(len(ids))]
    return weigh(model.final_norm(chosen) if part.normalises else chosen, weights), encoding.pooled


def weigh(hidden: Array, weights: Array) -> Array:
    """Multiply hidden states by the weights of their tokens, then scale them so that their mean is as before.

    As AUTOMATIC1111 does, for each chunk of each encoder by itself (its mean is over all chunks of a batch, which would
    tie a picture to its mates). Left out is the scaling where there is no mean to speak of: one below a thousandth of
    the root mean square, of another sign than before, or more than `MOST_RESCALED` times it. There it would
    multiply a picture by noise, up to infinity.

    Args:
        hidden: (chunks, tokens, channels).
        weights: (chunks, tokens) float32. Where all of a chunk's are 1, its states stay what they are to the bit.
    """
    states = hidden.astype(jnp.float32)
    weighted = states * weights[..., None]
    before, after = (x.mean(axis=(1, 2), keepdims=True) for x in (states, weighted))
    size = jnp.sqrt(jnp.square(states).mean(axis=(1, 2), keepdims=True))
    ratio = before / jnp.where(after == 0, 1, after)
    sound = (jnp.abs(before) > 1e-3 * size) & (ratio >= 1 / MOST_RESCALED) & (ratio <= MOST_RESCALED)
    plain = (weights == 1).all(axis=1)[:, None, None]
    return (weighted * jnp.where(sound & ~plain, ratio, 1)).astype(hidden.dtype)
