"""The layers that every model is built from, channels last.

Parameters keep `param_dtype`; arithmetic runs in `dtype`, except that statistics of a norm accumulate in float32.
"""

from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sdjax.models.convolution import conv2d


class Setup(TypedDict):
    """What every layer is built with: the dtypes of arithmetic and parameters, and the source of initial values."""

    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs


class Identity(nnx.Module):
    """Holds a place in a numbered list, where the checkpoint's list has a layer without parameters."""

    def __call__(self, x: Array) -> Array:
        """Return `x`."""
        return x


class Conv(nnx.Module):
    """A square convolution, (batch, height, width, in) -> (batch, height', width', out).

    `padding` is given per side of each axis, as `lax.conv_general_dilated` takes it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype))
        self.stride = stride
        self.padding = (kernel_size // 2, kernel_size // 2) if padding is None else padding
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Convolve; the result has the layer's dtype."""
        kernel, bias = (parameter[...].astype(self.dtype) for parameter in (self.kernel, self.bias))
        return conv2d(x.astype(self.dtype), kernel, stride=self.stride, padding=self.padding) + bias


class GroupNorm(nnx.Module):
    """Group normalisation over (height, width, channels of a group) (Wu and He 2018, arXiv 1803.08494)."""

    def __init__(
        self,
        groups: int,
        channels: int,
        *,
        epsilon: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups")
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.groups = groups
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Normalise (batch, ..., channels); the result has the layer's dtype."""
        wide = x.astype(jnp.float32)
        # A long sum in float32 leaves a large mean a little wrong; around it, what is missing is summed exactly enough.
        shifted = wide - self._spread(_mean(wide))
        rest = self._spread(_mean(shifted))
        variance = self._spread(_mean(jnp.square(shifted))) - jnp.square(rest)
        scale, bias = (parameter[...].astype(jnp.float32) for parameter in (self.scale, self.bias))
        return ((shifted - rest) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias).astype(self.dtype)

    def _spread(self, means: Array) -> Array:
        """Average the channels' means (batch, ..., channels) over each group, and give it to all of its channels."""
        grouped = means.reshape(*means.shape[:-1], self.groups, -1)
        return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(means.shape)


def _mean(x: Array) -> Array:
    """The mean over all axes between the first and the last, kept with length 1."""
    return x.mean(tuple(range(1, x.ndim - 1)), keepdims=True)


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
