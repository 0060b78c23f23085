"""The layers that every model is built from, channels last, with parameters as PyTorch stores them.

Names, shapes and orientation of parameters are the checkpoint's, so that loading is reading: a matrix is (out, in), a
convolution's kernel (out, in, height, width). Parameters keep the dtype they are made with; arithmetic runs in `dtype`,
except that statistics of a norm accumulate in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from typing_extensions import Unpack

from sdjax.models.kernels import Forms, convolve

SHORT_SUM = 64 * 64
"""Pixels up to which a sum in float32 is exact enough. A longer one leaves a large mean a little wrong; what is missing
is the mean of what is left after subtracting it."""

MakeParameter: TypeAlias = Callable[[tuple[int, ...], float, float], Any]
"""Gives what stands for a parameter, from its shape, and the mean and standard deviation of its initial values."""


class Setup(TypedDict):
    """The arguments of every layer: dtype of its arithmetic, forms of its kernels, and what makes its parameters."""

    dtype: DTypeLike
    forms: Forms
    make: MakeParameter


class Identity(nnx.Module):
    """Holds a place in a numbered list, where the checkpoint's list has a layer without parameters."""

    def __call__(self, x: Array) -> Array:
        """Return `x`."""
        return x


class Linear(nnx.Module):
    """A matrix product over the channels, (..., in) -> (..., out); its weight is (out, in)."""

    def __init__(self, in_channels: int, out_channels: int, *, use_bias: bool = True, **setup: Unpack[Setup]) -> None:
        make = setup["make"]
        self.weight = nnx.Param(make((out_channels, in_channels), 0.0, in_channels**-0.5))
        self.bias = nnx.Param(make((out_channels,), 0.0, 0.0)) if use_bias else None
        self.dtype = setup["dtype"]
        self.forms = setup["forms"]

    def __call__(self, x: Array) -> Array:
        """Multiply; the result has the layer's dtype."""
        product = self.forms.product(x.astype(self.dtype), self.weight[...].astype(self.dtype))
        return product if self.bias is None else product + self.bias[...].astype(self.dtype)


class Embedding(nnx.Module):
    """Rows of a table, by their numbers; its weight is (rows, channels)."""

    def __init__(self, rows: int, channels: int, **setup: Unpack[Setup]) -> None:
        self.weight = nnx.Param(setup["make"]((rows, channels), 0.0, channels**-0.5))
        self.dtype = setup["dtype"]

    def __call__(self, numbers: Array) -> Array:
        """Map (...) integers to (..., channels); a number out of range is clamped."""
        chosen: Array = self.weight[...].astype(self.dtype)[numbers]
        return chosen


class Conv(nnx.Module):
    """A square convolution, (batch, height, width, in) -> (batch, height', width', out).

    Its weight is (out, in, size, size). `padding` is given per side of each axis, as `lax.conv_general_dilated` takes
    it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        **setup: Unpack[Setup],
    ) -> None:
        shape, make = (out_channels, in_channels, kernel_size, kernel_size), setup["make"]
        self.weight = nnx.Param(make(shape, 0.0, (in_channels * kernel_size**2) ** -0.5))
        self.bias = nnx.Param(make((out_channels,), 0.0, 0.0))
        self.stride = stride
        self.padding = (kernel_size // 2, kernel_size // 2) if padding is None else padding
        self.dtype = setup["dtype"]
        self.forms = setup["forms"]

    def __call__(self, x: Array) -> Array:
        """Convolve; the result has the layer's dtype."""
        weight, bias = (parameter[...].astype(self.dtype) for parameter in (self.weight, self.bias))
        return convolve(self.forms, x.astype(self.dtype), weight, stride=self.stride, padding=self.padding) + bias


class LayerNorm(nnx.Module):
    """Normalisation over the channels (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, channels: int, *, epsilon: float, **setup: Unpack[Setup]) -> None:
        self.weight = nnx.Param(setup["make"]((channels,), 1.0, 0.0))
        self.bias = nnx.Param(setup["make"]((channels,), 0.0, 0.0))
        self.epsilon = epsilon
        self.dtype = setup["dtype"]

    def __call__(self, x: Array) -> Array:
        """Normalise (..., channels); the result has the layer's dtype."""
        normalised: Array = _layer_norm(x, self.weight[...], self.bias[...], self.epsilon, self.dtype)
        return normalised


@partial(jax.jit, static_argnums=(3, 4))
def _layer_norm(x: Array, weight: Array, bias: Array, epsilon: float, dtype: DTypeLike) -> Array:
    """A function of its own in the program: XLA would compute it anew for parts of a product that follows."""
    wide, weight, bias = (array.astype(jnp.float32) for array in (x, weight, bias))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * lax.rsqrt(variance + epsilon) * weight + bias).astype(dtype)


class GroupNorm(nnx.Module):
    """Group normalisation over (height, width, channels of a group) (Wu and He 2018, arXiv 1803.08494)."""

    def __init__(self, groups: int, channels: int, *, epsilon: float, **setup: Unpack[Setup]) -> None:
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups")
        self.weight = nnx.Param(setup["make"]((channels,), 1.0, 0.0))
        self.bias = nnx.Param(setup["make"]((channels,), 0.0, 0.0))
        self.groups = groups
        self.epsilon = epsilon
        self.dtype = setup["dtype"]

    def __call__(self, x: Array) -> Array:
        """Normalise (batch, ..., channels); the result has the layer's dtype."""
        wide = x.astype(jnp.float32)
        shifted = wide - self._spread(_mean(wide))
        variance = self._spread(_mean(jnp.square(shifted)))
        if math.prod(x.shape[1:-1]) > SHORT_SUM:
            rest = self._spread(_mean(shifted))
            shifted, variance = shifted - rest, variance - jnp.square(rest)
        weight, bias = (parameter[...].astype(jnp.float32) for parameter in (self.weight, self.bias))
        return (shifted * (lax.rsqrt(variance + self.epsilon) * weight) + bias).astype(self.dtype)

    def _spread(self, means: Array) -> Array:
        """Average the channels' means (batch, ..., channels) over each group, and give it to all of its channels."""
        grouped = means.reshape(*means.shape[:-1], self.groups, -1)
        return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(means.shape)


def _mean(x: Array) -> Array:
    """The mean over all axes between the first and the last, kept with length 1."""
    return x.mean(tuple(range(1, x.ndim - 1)), keepdims=True)


def silu(x: Array) -> Array:
    """x times its logistic (Hendrycks and Gimpel 2016, arXiv 1606.08415), of any shape, in x's dtype.

    Like the other activations it is computed in float32, as PyTorch's are: step by step in bfloat16 it would be less
    exact, and on a CPU take twice as long.
    """
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Array) -> Array:
    """x times the normal distribution's cumulative function at x (the same paper), of any shape, in x's dtype."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def quick_gelu(x: Array) -> Array:
    """The same paper's approximation of `gelu` by a logistic, of any shape, in x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


def timestep_embedding(timesteps: Array, channels: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Array:
    """Sinusoids of a timestep (Vaswani et al. 2017; diffusers `get_timestep_embedding`).

    Args:
        timesteps: (batch,), any real number.
        channels: an even number.
        flip_sin_to_cos: cosines first.
        freq_shift: subtracted from the number of frequencies in the exponent's denominator.

    Returns:
        (batch, channels) float32, whatever the model's dtype: neighbouring timesteps are one number in bfloat16.
    """
    half = channels // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cosine, sine] if flip_sin_to_cos else [sine, cosine], axis=-1)
