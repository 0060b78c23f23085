"""The noise of each row of a batch, from its own key."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

START_NOISE = 2**32 - 1
"""Stands where a step's index would, when the noise that a picture starts from is drawn from its key."""


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
