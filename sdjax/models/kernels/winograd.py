"""Convolutions of 3x3 with fewer multiplications (Lavin and Gray 2015, arXiv 1509.09308), as plain matrix products.

With the paper's letters, every `tile` x `tile` square of outputs Y is A' [(G g G') * (B' d B)] A, where d is the square
of inputs that it sees, g the kernel, * a product of matrices over the channels at each of its (tile + 2)**2 places, and
' a transpose. Each place is a matrix of its own here, for XLA's CPU backend copies what is sliced out of a larger
array before it multiplies, which costs more than the product does in a UNet's lower half.
"""

import operator
from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from sdjax.models.kernels.product import multiply_wide, sum_dtype


class Transform(NamedTuple):
    """The paper's matrices A', G and B' of one tile size."""

    output: NDArray[np.float64]
    kernel: NDArray[np.float64]
    input: NDArray[np.float64]


TRANSFORMS = {
    2: Transform(
        output=np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
        kernel=np.array([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]]),
        input=np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    ),
    4: Transform(
        output=np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
        kernel=np.array(
            [
                [1 / 4, 0, 0],
                [-1 / 6, -1 / 6, -1 / 6],
                [-1 / 6, 1 / 6, -1 / 6],
                [1 / 24, 1 / 12, 1 / 6],
                [1 / 24, -1 / 12, 1 / 6],
                [0, 0, 1],
            ]
        ),
        input=np.array(
            [
                [4, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1],
            ]
        ),
    ),
}
"""By tile size: F(2x2, 3x3) takes 4 multiplications where the plain sum has 9, F(4x4, 3x3) 2.25, and is less exact."""


def conv3x3(x: Array, weight: Array, *, tile: int, strip: int) -> Array:
    """Convolve with stride 1 and one row of zeros around.

    Args:
        x: (batch, height, width, in), of any size.
        weight: (out, in, 3, 3), of x's dtype. What is made of it depends on it alone, so a loop may keep it outside.
            In half precision all is computed in float32, and rounded once.
        tile: side of the squares of outputs, a key of `TRANSFORMS`.
        strip: rows of tiles that are worked on at once, which bounds the memory that a large picture takes. Fewer than
            all are a loop.

    Returns:
        (batch, height, width, out).
    """
    out: Array = _convolve(x, _transform_kernel(weight, tile), tile, strip)
    return out


@partial(jax.jit, static_argnums=(2, 3))
def _convolve(x: Array, places: Sequence[Array], tile: int, strip: int) -> Array:
    """Convolve with a transformed kernel.

    A function of its own in the program: traced and lowered once for all layers of a shape, which is most of both.
    """
    batch, height, width, _ = x.shape
    rows, columns = -(-height // tile), -(-width // tile)
    sides = (1, columns * tile + 1 - width)
    seen = strip * tile + 2
    if height < seen:
        padded = jnp.pad(x, ((0, 0), (1, rows * tile + 1 - height), sides, (0, 0)))
        return _convolve_strip(padded, places, tile)[:, :height, :width]
    strips = -(-rows // strip)
    below = strips * strip * tile + 1 - height

    def convolve(i: Array, out: Array) -> Array:
        first = i * (strip * tile)
        # The last strip sees zeros below the picture: what it sees of the picture moves up in it.
        start = jnp.minimum(first - 1, height - seen)
        padded = jnp.pad(lax.dynamic_slice_in_dim(x, start, seen, axis=1), ((0, 0), (0, below), sides, (0, 0)))
        moved = lax.dynamic_slice_in_dim(padded, first - 1 - start, seen, axis=1)
        return lax.dynamic_update_slice_in_dim(out, _convolve_strip_apart(moved, places, tile), first, axis=1)

    out = jnp.zeros((batch, strips * strip * tile, columns * tile, places[0].shape[0]), x.dtype)
    top = _convolve_strip_apart(jnp.pad(x[:, : seen - 1], ((0, 0), (1, 0), sides, (0, 0))), places, tile)
    out = lax.dynamic_update_slice_in_dim(out, top, 0, axis=1)
    whole: Array = lax.fori_loop(1, strips, convolve, out)
    return whole[:, :height, :width]


@partial(jax.jit, static_argnums=1, inline=True)
def _transform_kernel(weight: Array, tile: int) -> list[Array]:
    """G g G': a matrix (out, in) for each of the (tile + 2)**2 places.

    Traced once for all kernels of a shape too, but inlined: `sdjax.devices.staging` chooses which of them to keep.
    """
    G = TRANSFORMS[tile].kernel
    weight = weight.astype(sum_dtype(weight.dtype))
    parts = [weight[..., i, j] for i in range(3) for j in range(3)]
    return [_combine(np.outer(down, across).ravel(), parts) for down in G for across in G]


def _convolve_strip(x: Array, places: Sequence[Array], tile: int) -> Array:
    """Convolve (batch, rows * tile + 2, columns * tile + 2, in) without padding."""
    A, _, B = TRANSFORMS[tile]
    size = tile + 2
    batch, channels = x.shape[0], x.shape[-1]
    rows, columns = (x.shape[1] - 2) // tile, (x.shape[2] - 2) // tile

    def every(axis: int, i: int, x: Array) -> Array:
        """Every `tile`-th slice along an axis, from the i-th on, for as many as there are tiles."""
        count = (x.shape[axis] - 2) // tile
        return lax.slice_in_dim(x, i, i + tile * (count - 1) + 1, tile, axis)

    seen = [every(1, i, x).astype(places[0].dtype) for i in range(size)]
    half = _apart([_combine(row, seen) for row in B])
    products = []
    for i, across in enumerate(half):
        columns_seen = [every(2, j, across) for j in range(size)]
        for j, row in enumerate(B):
            transformed = _combine(row, columns_seen).reshape(-1, channels)
            products.append(multiply_wide(transformed, places[i * size + j]))
    halves = [_apart([_combine(row, products[j::size]) for j in range(size)]) for row in A]
    squares = [[_combine(row, across).reshape(batch, rows, columns, -1) for row in A] for across in halves]
    out = jnp.stack([jnp.stack(across, axis=3) for across in squares], axis=2)
    return out.reshape(batch, rows * tile, columns * tile, -1).astype(x.dtype)


_convolve_strip_apart = jax.jit(_convolve_strip, static_argnums=2)
"""A function in the program: what XLA fuses with the writing of a strip into the picture, it computes on one core. It
has to be called from two places at least, for XLA puts one that is called once in the place of its call."""


def _apart(terms: list[Array]) -> list[Array]:
    """Have XLA store the first half of a transform, which it would compute anew wherever the second half reads it."""
    stored: list[Array] = lax.optimization_barrier(terms)  # type: ignore[no-untyped-call]
    return stored


def _combine(weights: NDArray[np.float64], terms: Sequence[Array]) -> Array:
    """A weighted sum that leaves out what has no weight, and multiplies by nothing but what isn't one."""
    parts = [
        term if weight == 1 else -term if weight == -1 else term * jnp.asarray(weight, term.dtype)
        for weight, term in zip(weights, terms, strict=True)
        if weight != 0
    ]
    total: Array = reduce(operator.add, parts)
    return total
