"""Convolutions, and the forms in which they are computed. `forms` chooses the form."""

import operator
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from sdjax.models.kernels import winograd
from sdjax.models.kernels.product import accumulate, multiply_wide


@dataclass(frozen=True)
class Direct:
    """The backend's own convolution, of a kernel with its axes in this order."""

    order: Literal["OIHW", "HWIO"]


@dataclass(frozen=True)
class Places:
    """A sum of matrix products, one for each place of the kernel."""


@dataclass(frozen=True)
class Columns:
    """One matrix product of every pixel's surroundings (im2col), for 3x3 kernels with one row of padding."""


@dataclass(frozen=True)
class Winograd:
    """Winograd's F(tile x tile, 3 x 3), for stride 1 and one row of padding.

    Attributes:
        tile: outputs along a side of a tile, 2 or 4.
        strip: rows of tiles that are computed at once; fewer than all are a loop, which bounds memory.
        in_place: transform the kernel where it is used. Else a loop may transform it once, before its first turn.
    """

    tile: int
    strip: int
    in_place: bool


Form: TypeAlias = Direct | Places | Columns | Winograd
"""All forms give the same numbers, up to rounding."""


def conv2d(x: Array, weight: Array, *, stride: int, padding: tuple[int, int], form: Form) -> Array:
    """Convolve channels-last.

    Args:
        x: (batch, height, width, in).
        weight: (out, in, size, size), of x's dtype.
        stride: of both axes.
        padding: zeros before and after, of both axes.
        form: one that can compute this stride, padding and size.

    Returns:
        (batch, height', width', out) in x's dtype.
    """
    match form:
        case Places():
            return _by_place(x, weight, stride, padding)
        case Columns():
            return _columns(x, weight, stride)
        case Winograd(tile, strip, in_place):
            if in_place:
                weight, x = lax.optimization_barrier((weight, x))  # type: ignore[no-untyped-call]
            return winograd.conv3x3(x, weight, tile=tile, strip=strip)
        case Direct(order):
            kernel = weight.transpose(2, 3, 1, 0) if order == "HWIO" else weight
            return lax.conv_general_dilated(
                x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", order, "NHWC")
            )


def _by_place(x: Array, weight: Array, stride: int, padding: tuple[int, int]) -> Array:
    """Multiply the picture as every place of the kernel sees it, and add up."""
    size = weight.shape[-1]
    padded = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    height, width = (length - size + 1 for length in padded.shape[1:3])
    products = [
        accumulate(padded[:, i : i + height : stride, j : j + width : stride], weight[..., i, j])
        for i in range(size)
        for j in range(size)
    ]
    return reduce(operator.add, products).astype(x.dtype)


def _columns(x: Array, weight: Array, stride: int) -> Array:
    """Lay the 3x3 surroundings of every `stride`-th pixel side by side, channel by channel, and multiply once."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    columns = jnp.stack(around, axis=-1)
    return multiply_wide(columns.reshape(*columns.shape[:3], -1), weight.reshape(len(weight), -1))
