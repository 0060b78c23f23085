"""Which form computes a kernel on which target: the one table, from measurements (benchmarks/notes.md)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sdjax.devices.target import Target
from sdjax.models.kernels import attention, convolution
from sdjax.models.kernels.attention import Blocks, Library, Whole
from sdjax.models.kernels.convolution import Columns, Direct, Places, Winograd
from sdjax.models.kernels.product import multiply, multiply_wide

SHORT = 2**14
"""Scores of a head up to which they are computed whole: on a CPU for all heads at once, on a GPU by XLA's fusions."""
QUERIES_AT_ONCE, KEYS_AT_ONCE = 4096, 512
"""A CPU's blocks of attention: large enough that its cores seldom wait for each other."""
WIDEST_HEAD = {8: 128, 9: 256}
"""Channels of the widest head that cuDNN takes, by the major number of a GPU's compute capability."""

LARGEST_WHOLE = 768
"""Tiles of a picture up to which Winograd's forms compute it whole."""
TILES_OF_STRIP = 256
"""Tiles of a strip of a larger picture, about: less memory, and a strip's values stay in the caches."""
LARGEST_TRANSFORMED = 2**21
"""Inputs times outputs of a kernel above which its transform takes more memory, or time, than it saves."""
LARGEST_PREPARED = 2**16
"""Inputs times outputs of a kernel above which it is transformed where it is used, not before the loop: this costs a
fifteenth of a step of SD 1.5, and saves a third of its parameters' memory through the whole loop."""


@dataclass(frozen=True)
class Forms:
    """How a model's kernels are computed: static, and compared by identity of the functions.

    Attributes:
        product: (..., in) times the transpose of (out, in).
        convolution: chooses the form, of (picture, weight, stride=, padding=, dtype=): the input's (height, width), the
            kernel's (out, in, size, size), the stride and the padding of both axes, the dtype of the arithmetic.
        attention: chooses the form, of (queries=, keys=, channels=, dtype=, causal=), channels of a head.
    """

    product: Callable[[Array, Array], Array]
    convolution: Callable[..., convolution.Form]
    attention: Callable[..., attention.Form]


@cache
def forms_for(target: Target) -> Forms:
    """Give the forms that are fastest on a target. Equal targets give the same object."""
    if target.platform == "cpu":
        return Forms(multiply_wide, cpu_convolution, cpu_attention)
    return Forms(multiply, _own_convolution, partial(accelerator_attention, target.capability))


def attend(forms: Forms, query: Array, key: Array, value: Array, *, causal: bool = False) -> Array:
    """Attend in the form that is chosen for these shapes; the arguments are those of `attention`."""
    _, queries, _, channels = query.shape
    form = forms.attention(queries=queries, keys=key.shape[1], channels=channels, dtype=query.dtype, causal=causal)
    return attention.attention(query, key, value, form=form, causal=causal)


def convolve(forms: Forms, x: Array, weight: Array, *, stride: int, padding: tuple[int, int]) -> Array:
    """Convolve in the form that is chosen for these shapes, a 1x1 kernel as a product; arguments as of `conv2d`."""
    if weight.shape[2] == 1 and stride == 1 and padding == (0, 0):
        return forms.product(x, weight[..., 0, 0])
    form = forms.convolution(x.shape[1:3], weight.shape, stride=stride, padding=padding, dtype=x.dtype)
    return convolution.conv2d(x, weight, stride=stride, padding=padding, form=form)


def cpu_convolution(
    picture: tuple[int, int], weight: tuple[int, ...], *, stride: int, padding: tuple[int, int], dtype: DTypeLike
) -> convolution.Form:
    """Choose a CPU's form. XLA's own reaches three quarters of PyTorch's speed there, its matrix products more."""
    size, (narrow, wide) = weight[2], sorted(weight[:2])
    # XLA brings a kernel into the order HWIO by itself, but not in a loop, where OIHW is up to 8 times as slow.
    own = Direct("HWIO")
    if size != 3 or stride > 2 or padding != (1, 1):
        return own
    pixels = picture[0] * picture[1]
    # With so few pixels and channels a product is too small to pay for the work around it, and for its compilation.
    if narrow * wide <= (128 * 128 if pixels > 32 * 32 else 256 * 256):
        return own
    # A transform multiplies rounding errors, so Winograd's form of half precision computes in float32 and rounds once.
    # With few pixels nine products by the processor's bfloat16 instructions are faster; it has none for float16.
    if jnp.dtype(dtype).itemsize < 4 and (stride == 2 or pixels <= 64 * 64):
        if jnp.dtype(dtype) != jnp.bfloat16:
            return own
        return Columns() if pixels <= 8 * 8 * stride**2 else Places()
    if stride == 2:
        return Columns() if pixels <= 16 * 16 else own
    # The weights of F(4x4) take four times the kernel's memory, of F(2x2) 16/9: it pays for small kernels.
    in_place = narrow * wide > LARGEST_PREPARED
    if pixels >= 64 * 64 or (pixels >= 32 * 32 and narrow * wide <= 640 * 640):
        return winograd_form(picture, 4, in_place=in_place)
    if pixels >= 16 * 16 and narrow * wide <= LARGEST_TRANSFORMED:
        return winograd_form(picture, 2, in_place=in_place)
    return Columns()


def winograd_form(picture: tuple[int, int], tile: int, *, in_place: bool) -> Winograd:
    """Choose the strips in which a picture (height, width) is computed."""
    rows, columns = (-(-side // tile) for side in picture)
    strips = 1 if rows * columns <= LARGEST_WHOLE else -(-rows * columns // TILES_OF_STRIP)
    return Winograd(tile, strip=-(-rows // strips), in_place=in_place)


def cpu_attention(*, queries: int, keys: int, causal: bool, **_: Any) -> attention.Form:
    """Choose a CPU's form."""
    if causal or queries * keys <= SHORT:
        return Whole()
    return Blocks(queries=min(queries, QUERIES_AT_ONCE), keys=KEYS_AT_ONCE)


def accelerator_attention(
    capability: tuple[int, int] | None,
    *,
    queries: int,
    keys: int,
    channels: int,
    dtype: DTypeLike,
    causal: bool,
) -> attention.Form:
    """Choose cuDNN's flash attention where it fits: it never writes the scores to memory, and takes 16-bit numbers.

    Args:
        capability: the compute capability of an NVIDIA GPU, None for any other device.
        queries: of each head.
        keys: of each head.
        channels: of each head, before padding.
        dtype: of queries, keys and values.
        causal: query i sees keys 0..i only.
    """
    own = Library("xla")
    if capability is None or capability[0] < min(WIDEST_HEAD) or jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return own
    widest = WIDEST_HEAD[min(capability[0], max(WIDEST_HEAD))]
    fits = channels + attention.padding(channels) <= widest
    return Library("cudnn") if fits and queries * keys > SHORT else own


def _own_convolution(*_: Any, **__: Any) -> convolution.Form:
    """Accelerators have tuned convolutions."""
    return Direct("OIHW")


PLAIN = Forms(multiply, _own_convolution, lambda **_: Whole())
"""The textbook forms, for counting operations."""
