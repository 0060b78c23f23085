"""How a convolution is computed: the one place that chooses its form."""

import operator
from enum import Enum
from functools import reduce

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from sdjax.models import winograd
from sdjax.models.product import accumulate, multiply

LARGEST_WHOLE = 768
"""Tiles of a picture up to which Winograd's forms work on it whole."""
TILES_OF_STRIP = 256
"""Tiles of a strip of a larger picture, about: less memory, and what is made of a strip stays in the caches."""

LARGEST_TRANSFORMED = 2**21
"""Inputs times outputs of a kernel above which its transform takes more memory, or time if made anew, than it saves."""
LARGEST_PREPARED = 2**16
"""Inputs times outputs of a kernel above which its transform is made when it is used, not before the loop: a fifteenth
of a step of SD 1.5, beside a third of the memory that its parameters take, through the whole loop."""


class Form(Enum):
    """A way to compute a convolution; all give the same numbers, up to rounding."""

    DIRECT = "the backend's own"
    POINTWISE = "a matrix product over the channels"
    PLACES = "a sum of matrix products, one for each place of the kernel"
    COLUMNS = "one matrix product of every pixel's surroundings"
    WINOGRAD_2 = "Winograd's F(2x2, 3x3)"
    WINOGRAD_4 = "Winograd's F(4x4, 3x3)"


def choose(
    picture: tuple[int, int],
    weight: tuple[int, ...],
    *,
    stride: int,
    padding: tuple[int, int],
    dtype: DTypeLike,
    backend: str,
) -> Form:
    """Choose the fastest form that was measured for such a shape (benchmarks/notes.md has the figures).

    Args:
        picture: height and width of the input.
        weight: (out, in, size, size).
        stride: of both axes.
        padding: of both axes.
        dtype: of the arithmetic.
        backend: "cpu", "gpu" or "tpu".
    """
    size, (narrow, wide) = weight[2], sorted(weight[:2])
    if size == 1 and stride == 1 and padding == (0, 0):
        return Form.POINTWISE
    # GPUs and TPUs have tuned convolutions; on a CPU, XLA's reach three quarters of PyTorch's speed, its products more.
    if backend != "cpu" or size != 3 or stride > 2 or padding != (1, 1):
        return Form.DIRECT
    pixels = picture[0] * picture[1]
    # Of so few pixels and channels a product is too small to make up for what is done around it, and compiled.
    if narrow * wide <= (128 * 128 if pixels > 32 * 32 else 256 * 256):
        return Form.DIRECT
    # A transform multiplies rounding errors, so Winograd's form of half precision computes in float32, and rounds once.
    # Of few pixels nine products by the processor's bfloat16 instructions are faster; it has none for float16.
    if jnp.dtype(dtype).itemsize < 4 and (stride == 2 or pixels <= 64 * 64):
        if jnp.dtype(dtype) != jnp.bfloat16:
            return Form.DIRECT
        return Form.COLUMNS if pixels <= 8 * 8 * stride**2 else Form.PLACES
    if stride == 2:
        return Form.COLUMNS if pixels <= 16 * 16 else Form.DIRECT
    # The weights of F(4x4) are four times the kernel's, of F(2x2) 16/9: worth it where they are few beside the pixels.
    if pixels >= 64 * 64 or (pixels >= 32 * 32 and narrow * wide <= 640 * 640):
        return Form.WINOGRAD_4
    return Form.WINOGRAD_2 if pixels >= 16 * 16 and narrow * wide <= LARGEST_TRANSFORMED else Form.COLUMNS


def conv2d(x: Array, weight: Array, *, stride: int, padding: tuple[int, int]) -> Array:
    """Convolve channels-last.

    Args:
        x: (batch, height, width, in).
        weight: (out, in, size, size), of x's dtype.
        stride: of both axes.
        padding: zeros before and after, of both axes.

    Returns:
        (batch, height', width', out) in x's dtype.
    """
    _, height, width, _ = x.shape
    backend = jax.default_backend()
    form = choose((height, width), weight.shape, stride=stride, padding=padding, dtype=x.dtype, backend=backend)
    match form:
        case Form.POINTWISE:
            return multiply(x, weight[..., 0, 0])
        case Form.PLACES:
            return _by_place(x, weight, stride, padding)
        case Form.COLUMNS:
            return _columns(x, weight, stride)
        case Form.WINOGRAD_2 | Form.WINOGRAD_4:
            tile = 2 if form is Form.WINOGRAD_2 else 4
            if weight.shape[0] * weight.shape[1] > LARGEST_PREPARED:
                weight, x = lax.optimization_barrier((weight, x))  # type: ignore[no-untyped-call]
            rows, columns = -(-height // tile), -(-width // tile)
            strips = 1 if rows * columns <= LARGEST_WHOLE else -(-rows * columns // TILES_OF_STRIP)
            return winograd.conv3x3(x, weight, tile=tile, strip=-(-rows // strips))
    order = "OIHW"
    if backend == "cpu":
        # XLA brings a kernel into this order by itself, but not in a loop: there another one is up to 8 times as slow.
        weight, order = weight.transpose(2, 3, 1, 0), "HWIO"
    return lax.conv_general_dilated(
        x, weight, (stride, stride), (padding, padding), dimension_numbers=("NHWC", order, "NHWC")
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
    return multiply(columns.reshape(*columns.shape[:3], -1), weight.reshape(len(weight), -1))
