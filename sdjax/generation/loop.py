"""The denoising loop: one `lax.fori_loop` over the rows of each picture's own sampler table."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from sdjax.devices.target import precision
from sdjax.generation.batch import Conditioning, Table, per_image
from sdjax.generation.guidance import stage_denoiser
from sdjax.generation.noise import draw_noise
from sdjax.models import Definition, Params


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
        scaled = per_image(row.input_scale) * state[:, 0]
        output = denoiser.predict(params, cond, prepared, index, scaled, row.timesteps)
        noise = draw_noise(cond.keys, index, output.shape[1:])
        moved = jnp.einsum("bij,bj...->bi...", row.A, state, precision=lax.Precision.HIGHEST)
        moved += per_image(row.B) * output[:, None] + per_image(row.C) * noise[:, None]
        if cond.known is not None:
            mask, latents, eps = cond.known
            kept = per_image(row.signal) * latents + per_image(row.noise) * eps
            moved = moved.at[:, 0].set(mask * moved[:, 0] + (1 - mask) * kept)
        return jnp.where(per_image(index < end)[:, None], moved, state)

    with precision(definition.dtype):
        end_state: Array = lax.fori_loop(0, length, body, state)
    return end_state
