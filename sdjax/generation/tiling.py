"""Large pictures through the autoencoder: tile by tile, so that memory stops growing with the picture."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

OVERLAP = 4
"""Tiles overlap by this part of their side."""


def in_tiles(
    function: Callable[[Array], Array], tile: int | None, per_in: int, per_out: int
) -> Callable[[Array], Array]:
    """Apply a function of pictures or latents to tiles that overlap, and blend them with ramps.

    Every tile has the same size, so the function is compiled once, and a scan over the tiles' corners holds one tile's
    feature maps at a time. What the function's norms see is a tile instead of the whole: that is the difference.

    Args:
        function: of (batch, height, width, channels), local but for its norms.
        tile: side in latents, or None to apply the function as it is.
        per_in: pixels of its argument for each latent, along a side.
        per_out: likewise of its result.
    """
    if tile is None:
        return function

    def tiled(x: Array) -> Array:
        batch, *shape, channels = x.shape
        size = [side // per_in for side in shape]
        sides = [min(tile, side) for side in size]
        corners = [(top, left) for top in _starts(size[0], sides[0]) for left in _starts(size[1], sides[1])]
        weight = jnp.asarray(np.outer(*(_ramp(side * per_out) for side in sides)))[None, ..., None]

        def drawn(corner: Array) -> Array:
            at = (0, corner[0] * per_in, corner[1] * per_in, 0)
            part = lax.dynamic_slice(x, at, (batch, sides[0] * per_in, sides[1] * per_in, channels))
            return weight * function(part)

        def add(sums: tuple[Array, Array], corner: Array) -> tuple[tuple[Array, Array], None]:
            at = (0, corner[0] * per_out, corner[1] * per_out, 0)

            def added(into: Array, more: Array) -> Array:
                return lax.dynamic_update_slice(into, lax.dynamic_slice(into, at, more.shape) + more, at)

            return (added(sums[0], drawn(corner)), added(sums[1], weight)), None

        where = jnp.asarray(corners, jnp.int32)
        made = [side * per_out for side in size]
        out_channels = jax.eval_shape(drawn, where[0]).shape[-1]
        nothing = jnp.zeros((batch, *made, out_channels), jnp.float32), jnp.zeros((1, *made, 1), jnp.float32)
        (total, weights), _ = lax.scan(add, nothing, where)
        blended: Array = total / weights
        return blended

    return tiled


def _starts(length: int, tile: int) -> NDArray[np.int32]:
    """Corners along a side, spread evenly."""
    count = -(-(length - tile) // max(tile - tile // OVERLAP, 1)) + 1
    return np.linspace(0, length - tile, count).round().astype(np.int32)


def _ramp(size: int) -> NDArray[np.float32]:
    """Weights along a side, falling to almost nothing at both ends."""
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 1
    return np.minimum(distance / (size // OVERLAP + 1), 1).astype(np.float32)
