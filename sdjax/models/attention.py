"""Multi-head attention, and the transformer blocks of a UNet."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array
from typing_extensions import Unpack

from sdjax.models.kernels import attend
from sdjax.models.layers import Conv, GroupNorm, Identity, LayerNorm, Linear, Setup, gelu


class Attention(nnx.Module):
    """Multi-head attention of `x` to a context (or to itself), (batch, tokens, channels) -> the same shape."""

    def __init__(self, channels: int, context_channels: int, heads: int, **setup: Unpack[Setup]) -> None:
        if channels % heads:
            raise ValueError(f"{channels} channels do not divide into {heads} attention heads")
        self.to_q = Linear(channels, channels, use_bias=False, **setup)
        self.to_k = Linear(context_channels, channels, use_bias=False, **setup)
        self.to_v = Linear(context_channels, channels, use_bias=False, **setup)
        self.to_out = nnx.List([Linear(channels, channels, **setup)])
        self.heads = heads
        self.forms = setup["forms"]

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """Attend to `context` (batch, keys, context_channels), or to `x` where it is None."""
        context = x if context is None else context
        query, key, value = (
            y.reshape(*y.shape[:-1], self.heads, -1) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attend(self.forms, query, key, value).reshape(x.shape))


def gated(x: Array) -> Array:
    """Multiply the first half of the channels by the GELU of the other: (..., 2 * hidden) to (..., hidden)."""
    linear, gate = jnp.split(x, 2, axis=-1)
    return linear * gelu(gate)


class GEGLU(nnx.Module):
    """A gated linear unit with an exact GELU gate (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int, **setup: Unpack[Setup]) -> None:
        self.proj = Linear(channels, 2 * hidden, **setup)

    def __call__(self, x: Array) -> Array:
        """Map (..., channels) to (..., hidden)."""
        return gated(self.proj(x))


class FeedForward(nnx.Module):
    """The transformer's two-layer network, four times as wide inside."""

    def __init__(self, channels: int, **setup: Unpack[Setup]) -> None:
        self.net = nnx.List(
            [GEGLU(channels, 4 * channels, **setup), Identity(), Linear(4 * channels, channels, **setup)]
        )

    def __call__(self, x: Array) -> Array:
        """Map (..., channels) to the same shape."""
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nnx.Module):
    """Attention to itself, to the text, and a feed-forward network, each added to what came in."""

    def __init__(self, channels: int, context_channels: int, heads: int, **setup: Unpack[Setup]) -> None:
        norm = partial(LayerNorm, channels, epsilon=1e-5, **setup)
        self.norm1 = norm()
        self.attn1 = Attention(channels, channels, heads, **setup)
        self.norm2 = norm()
        self.attn2 = Attention(channels, context_channels, heads, **setup)
        self.norm3 = norm()
        self.ff = FeedForward(channels, **setup)

    def __call__(self, x: Array, context: Array) -> Array:
        """Map x (batch, tokens, channels), context (batch, keys, context_channels) to x's shape."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """Transformer blocks over the pixels of a feature map, added to it."""

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        *,
        layers: int,
        groups: int,
        linear_projection: bool,
        **setup: Unpack[Setup],
    ) -> None:
        projection = Linear if linear_projection else partial(Conv, kernel_size=1)
        self.norm = GroupNorm(groups, channels, epsilon=1e-6, **setup)
        self.proj_in = projection(channels, channels, **setup)
        self.transformer_blocks = nnx.List(
            [TransformerBlock(channels, context_channels, heads, **setup) for _ in range(layers)]
        )
        self.proj_out = projection(channels, channels, **setup)

    def __call__(self, x: Array, context: Array) -> Array:
        """Map x (batch, height, width, channels), context (batch, keys, context_channels) to x's shape."""
        batch, height, width, channels = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(batch, height * width, channels)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.reshape(x.shape))
