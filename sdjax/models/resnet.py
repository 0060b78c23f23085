"""The convolutional blocks that the UNet and the VAE share."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from typing_extensions import Unpack

from sdjax.models.layers import Conv, GroupNorm, Linear, Setup, silu


class ResnetBlock(nnx.Module):
    """Two normalised convolutions added to their input; a UNet's also hears the time."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        epsilon: float,
        time_channels: int | None = None,
        **setup: Unpack[Setup],
    ) -> None:
        self.norm1 = GroupNorm(groups, in_channels, epsilon=epsilon, **setup)
        self.conv1 = Conv(in_channels, out_channels, 3, **setup)
        self.time_emb_proj = None if time_channels is None else Linear(time_channels, out_channels, **setup)
        self.norm2 = GroupNorm(groups, out_channels, epsilon=epsilon, **setup)
        self.conv2 = Conv(out_channels, out_channels, 3, **setup)
        self.conv_shortcut = None if in_channels == out_channels else Conv(in_channels, out_channels, 1, **setup)

    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """Map x (batch, height, width, in), time (batch, time_channels) to (batch, height, width, out)."""
        hidden = self.conv1(silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            if time is None:
                raise ValueError("this block was built to hear the time, and got none")
            hidden = hidden + self.time_emb_proj(silu(time))[:, None, None, :]
        hidden = self.conv2(silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """Halve height and width (rounding up where the padding is even) with a convolution of stride 2."""

    def __init__(self, channels: int, *, padding: tuple[int, int] = (1, 1), **setup: Unpack[Setup]) -> None:
        self.conv = Conv(channels, channels, 3, stride=2, padding=padding, **setup)

    def __call__(self, x: Array) -> Array:
        """Map (batch, height, width, channels) to half the height and width."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Repeat every pixel twice along both axes, then convolve."""

    def __init__(self, channels: int, **setup: Unpack[Setup]) -> None:
        self.conv = Conv(channels, channels, 3, **setup)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        """Map (batch, height, width, channels) to twice the height and width, or to `size`, at most one pixel less."""
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x if size is None else x[:, : size[0], : size[1]])
