"""From words to pictures in three pure functions: `encode_prompt`, `denoise` and `decode`.

Each is a function of (definition, params, arrays): it can be jitted (the definition is static), vmapped, sharded and
differentiated. Batch rows are independent: each has its own prompt, guidance, noise, sampler and place in it.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpy.typing import NDArray

from sdjax.backend import by_row, precision, wide
from sdjax.batch import Conditioning, Table
from sdjax.guidance import stage_denoiser
from sdjax.models import CLIPText, Definition, Params, bind
from sdjax.tiling import in_tiles

PIXELS_AT_ONCE = 2**20
"""Pixels whose encoding or decoding may hold memory at one time; the rest of a batch follows."""

MOST_RESCALED = 10.0
"""How far weights may change the scale of a prompt's hidden states, up or down, and have it restored."""

START_NOISE = 2**32 - 1
"""Stands where a step's index would, when the noise that a picture starts from is drawn from its key."""


class Tokens(NamedTuple):
    """Prompts for one text encoder, in chunks of its length.

    ids: (..., chunks, length) int32, with an end token in every chunk.
    weights: (..., chunks, length) float32, how much each token counts; 1 is plain.
    """

    ids: Array | NDArray[np.int32]
    weights: Array | NDArray[np.float32]


class Text(NamedTuple):
    """Encoded prompts: `context` (..., tokens, channels), and SDXL's `pooled` (..., channels), else None."""

    context: Array
    pooled: Array | None


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
        The context of a prompt's chunks, one after the other: (..., chunks * length, channels). SD 1 and 2: the last
        hidden state that is not left out, normalised. SDXL: the one before it, of all encoders side by side and not
        normalised, and the last encoder's pooled vector of the first chunk, which `clip_skip` and weights leave alone.
    """
    states, pooled = [], None
    with precision(definition.dtype):
        for i, ((name, encoder), given) in enumerate(zip(definition.text_encoders, tokens, strict=True)):
            ids, weights = jnp.asarray(given.ids), jnp.asarray(given.weights)
            *prompts, chunks, length = ids.shape
            skipped = jnp.broadcast_to(jnp.asarray(clip_skip, jnp.int32)[..., None], (*prompts, chunks))
            learned = None if vectors is None else jnp.asarray(vectors[i])
            read = partial(_read_chunks, bind(encoder, params[name]), learned, definition.is_xl)
            hidden, at_end = by_row(read, (ids.reshape(-1, length), weights.reshape(-1, length), skipped.reshape(-1)))
            states.append(hidden.reshape(*prompts, chunks * length, -1))
            pooled = at_end.reshape(*prompts, chunks, -1)[..., 0, :]
    return Text(jnp.concatenate(states, axis=-1), pooled if definition.is_xl else None)


def _read_chunks(
    model: CLIPText, vectors: Array | None, is_xl: bool, rows: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """Encode chunks, (batch, length) ids and weights and (batch,) `clip_skip`: weighted states, and pooled vectors."""
    ids, weights, clip_skip = rows
    encoding = model(ids, vectors)
    states = jnp.stack(encoding.hidden_states)
    chosen = states[len(states) - 1 - is_xl - clip_skip, jnp.arange(len(ids))]
    return _weigh(chosen if is_xl else model.final_norm(chosen), weights), encoding.pooled


def _weigh(hidden: Array, weights: Array) -> Array:
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


def denoise(
    definition: Definition,
    params: Params,
    cond: Conditioning,
    state: ArrayLike,
    table: Table,
    start: ArrayLike,
    stop: ArrayLike,
    *,
    guidance_axis: str | None = None,
) -> Array:
    """Walk every row of a batch through rows `start` to `stop` of its own table.

    One `lax.fori_loop`; where one row stops before another it stands still. Python integers as bounds make a loop of
    known length, which differentiates in reverse; traced bounds serve any length with one executable.

    Args:
        definition: static.
        params: of the whole checkpoint.
        cond: what steers each row.
        state: (batch, 1 + HISTORY, height, width, channels) float32: the latents, then what a sampler remembers.
        table: the samplers, see `stack_tables`.
        start: the first table row to run, () or (batch,) integers.
        stop: the table row to stop before, likewise. Indices out of the table would be clamped without a word: keeping
            0 <= start and stop <= rows is the caller's part.
        guidance_axis: name of the mapped axis (of `jax.shard_map`) along which each device has one half of guidance, in
            the order of the halves; None where all of it is here.

    Returns:
        The state after it, like `state`; `[:, 0]` are the latents, `[:, -1]` the estimate of the clean ones.
    """
    length: int | Array
    if isinstance(start, int) and isinstance(stop, int):
        length = stop - start
    else:
        length = jnp.max(jnp.asarray(stop) - jnp.asarray(start))
    state = jnp.asarray(state, jnp.float32)
    table = jax.tree.map(jnp.asarray, table)
    rows = jnp.arange(state.shape[0])
    first, end = (jnp.broadcast_to(jnp.asarray(bound, jnp.int32), rows.shape) for bound in (start, stop))

    denoiser = stage_denoiser(definition, params, cond, (state.shape[0], *state.shape[2:]), guidance_axis)
    prepared = denoiser.prepare(params, cond)

    def body(i: ArrayLike, state: Array) -> Array:
        index = first + jnp.asarray(i, jnp.int32)
        row = jax.tree.map(lambda column: column[rows, index], table)
        scaled = wide(row.input_scale) * state[:, 0]
        output = denoiser.predict(params, cond, prepared, index, scaled, row.timesteps)
        noise = draw_noise(cond.keys, index, output.shape[1:])
        moved = jnp.einsum("bij,bj...->bi...", row.A, state, precision=lax.Precision.HIGHEST)
        moved += wide(row.B) * output[:, None] + wide(row.C) * noise[:, None]
        if cond.known is not None:
            mask, latents, eps = cond.known
            kept = wide(row.signal) * latents + wide(row.noise) * eps
            moved = moved.at[:, 0].set(mask * moved[:, 0] + (1 - mask) * kept)
        return jnp.where(wide(index < end)[:, None], moved, state)

    with precision(definition.dtype):
        end_state: Array = lax.fori_loop(0, length, body, state)
    return end_state


def encode(definition: Definition, params: Params, pictures: ArrayLike, tile: int | None = None) -> Array:
    """Turn pictures into latents: the mean of what the autoencoder says, as many at once as memory allows.

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
        means: Array = by_row(in_tiles(lambda x: vae.encode(x).mean, tile, config.factor, 1), pictures, at_once)
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
        pictures = by_row(in_tiles(vae.decode, tile, 1, config.factor), latents, at_once)
    return jnp.clip(pictures / 2 + 0.5, 0.0, 1.0)


def encoded_at_once(definition: Definition, pictures: ArrayLike) -> int:
    """How many of such pictures are encoded at once."""
    height, width = np.shape(pictures)[1:3]
    return max(1, PIXELS_AT_ONCE // int(height * width))


def decoded_at_once(definition: Definition, latents: ArrayLike) -> int:
    """How many of such latents are decoded at once."""
    height, width = np.shape(latents)[1:3]
    return max(1, PIXELS_AT_ONCE // int(height * width * definition.vae_config.factor**2))


def draw_noise(keys: ArrayLike, index: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Standard normal noise of each row, from its key and its step alone: batch mates and slices don't change it.

    Args:
        keys: (batch, 2) uint32.
        index: () or (batch,), a table row, or `START_NOISE`.
        shape: of one row.

    Returns:
        (batch, *shape) float32, the same with any of JAX's generator settings.
    """
    # The implementation is named and its layout pinned: both depend on global settings, which must not change pictures.
    with jax.threefry_partitionable(True):
        wrapped = jax.random.wrap_key_data(jnp.asarray(keys, jnp.uint32), impl="threefry2x32")
        index = jnp.broadcast_to(jnp.asarray(index, jnp.uint32), wrapped.shape)
        return jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(
            wrapped, index
        )
