"""A batch as data: what steers each of its rows, the samplers' tables side by side, and the state that walks them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from sdjax.schedulers import HISTORY, Schedule


class Known(NamedTuple):
    """The picture under the one that is painted: where the mask is 0 it stays, carried along at each step's level.

    mask: (batch, height, width, 1) float32, 1 where the sampler paints.
    latents: (batch, height, width, channels), clean.
    noise: likewise, of unit variance: the same at every step.
    """

    mask: Array
    latents: Array
    noise: Array


class Control(NamedTuple):
    """What one ControlNet sees, and how much it says.

    image: (batch, height * f, width * f, 3) float32 in 0..1.
    scale: (guidance, batch, rows) float32, a factor for every table row: 0 outside its share of the steps.
    falloff: (batch, feature maps) float32, a factor for every feature map, from the highest resolution down.
    """

    image: Array
    scale: Array
    falloff: Array


class Conditioning(NamedTuple):
    """What steers every row of a batch. What is None or empty takes no part, and no time.

    Guidance is an axis of its own, of length 2 (without and with the prompt) or, where no row asks for guidance, 1.

    context: (guidance, batch, tokens, channels), the encoded prompts.
    weights: (guidance, batch) float32: a row's output is the weighted sum, [1 - scale, scale], or [1].
    keys: (batch, 2) uint32, Threefry keys from which a row's noise is drawn, by step.
    extra: (batch, height, width, in_channels - latent channels): what an inpainting UNet sees beside the latents.
    added: what the denoiser's family adds, a tree of (guidance, batch, ...), or None: see `Family.added`.
    rescale: (batch,) float32, how far to bring the guided output back to the spread of the one with the prompt.
    known: what inpainting keeps.
    controls: one entry for each of the definition's ControlNets.
    """

    context: Array
    weights: Array
    keys: Array
    extra: Array
    added: Any = None
    rescale: Array | None = None
    known: Known | None = None
    controls: tuple[Control, ...] = ()


class Table(NamedTuple):
    """The part of a `Schedule` that the loop reads, float32, with a leading batch axis and padded rows.

    `signal` and `noise` are the level that a row leads to; after the last the latents are taken as clean, even where a
    model's own last level is not quite (`set_alpha_to_one` false).
    """

    timesteps: ArrayLike
    input_scale: ArrayLike
    A: ArrayLike
    B: ArrayLike
    C: ArrayLike
    signal: ArrayLike
    noise: ArrayLike


class Batch(NamedTuple):
    """All that the loop takes beside the weights; `start` and `stop` (batch,) int32 bound each row's walk."""

    cond: Conditioning
    state: Array
    table: Table
    start: Array
    stop: Array


def join(batches: Sequence["Batch"]) -> "Batch":
    """Put batches of equal structure one behind the other: the rows of the first come first."""

    def joined(axis: int, *parts: ArrayLike) -> Array:
        return jnp.concatenate([jnp.asarray(part) for part in parts], axis)

    whole: Batch = jax.tree.map(joined, batch_axes(batches[0]), *batches)
    return whole


def put_row(batch: Batch, slot: ArrayLike, source: Batch, row: ArrayLike) -> Batch:
    """Copy row `row` of one batch into row `slot` of another of equal structure; both may be traced."""

    def put(axis: int, into: Array, taken: Array) -> Array:
        new = jnp.take(jnp.asarray(taken), jnp.asarray(row), axis=axis)
        return jnp.moveaxis(
            jnp.moveaxis(jnp.asarray(into), axis, 0).at[slot].set(jnp.moveaxis(new, axis, axis)), 0, axis
        )

    replaced: Batch = jax.tree.map(put, batch_axes(batch), batch, source)
    return replaced


def batch_axes(batch: Batch) -> Batch:
    """Which axis of each array counts the rows of the batch: the one after guidance, where there is guidance."""
    axes = jax.tree.map(lambda _: 0, batch)
    behind = {name: jax.tree.map(lambda _: 1, getattr(batch.cond, name)) for name in ("context", "weights", "added")}
    controls = tuple(control._replace(scale=1) for control in axes.cond.controls)
    marked: Batch = axes._replace(cond=axes.cond._replace(**behind, controls=controls))
    return marked


def seed_keys(seeds: Sequence[int]) -> NDArray[np.uint32]:
    """The Threefry keys of seeds, each 0 to 2**64 - 1: (batch, 2)."""
    return np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def stack_tables(schedules: Sequence[Schedule], rows: int) -> Table:
    """Put one schedule a batch row side by side, padded to `rows` table rows, which are never reached."""

    def column(name: str) -> NDArray[np.float32]:
        parts = [getattr(schedule, name)[-len(schedule.step) :] for schedule in schedules]
        padded = [np.pad(part, [(0, rows - len(part))] + [(0, 0)] * (part.ndim - 1)) for part in parts]
        return np.stack(padded).astype(np.float32)

    stacked = {name: column(name) for name in Table._fields}
    for row, schedule in enumerate(schedules):
        last = len(schedule.step) - 1
        stacked["signal"][row, last], stacked["noise"][row, last] = 1, 0
    return Table(**stacked)


def start_state(scale: ArrayLike, noise: ArrayLike, latents: ArrayLike = 0.0) -> Array:
    """The state that a walk starts from: nothing remembered, and latents that are noise, or a picture under noise.

    Args:
        scale: (batch,), what noise is multiplied by: each schedule's `init_noise`, or its `noise` at the first row.
        noise: (batch, height, width, channels), of unit variance.
        latents: what lies under the noise, already multiplied by the first row's `signal`.

    Returns:
        (batch, 1 + HISTORY, height, width, channels) float32.
    """
    latents = latents + per_image(scale) * jnp.asarray(noise, jnp.float32)
    return jnp.pad(latents[:, None], [(0, 0), (0, HISTORY), (0, 0), (0, 0), (0, 0)])


def per_image(x: ArrayLike) -> Array:
    """Append three axes, so that (batch,) broadcasts over (batch, height, width, channels)."""
    return jnp.asarray(x)[..., None, None, None]
