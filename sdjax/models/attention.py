"""Attention, and the transformer that a UNet's blocks hold.

The form in which a softmax of products is computed depends on backend and size, and is chosen in `attention` alone.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from typing_extensions import Unpack

from sdjax.models import flash
from sdjax.models.exponential import exp_of_negative
from sdjax.models.layers import Conv, GroupNorm, Identity, LayerNorm, Linear, Setup, gelu
from sdjax.models.product import accumulate

QUERIES_AT_ONCE, KEYS_AT_ONCE = 4096, 512
"""Queries and keys of one head that are scored at once on a CPU: enough that its cores seldom wait for each other."""
SHORT = 2**14
"""Scores of a head up to which a CPU computes all heads at once."""


def attention(query: Array, key: Array, value: Array, *, causal: bool = False) -> Array:
    """Scaled dot-product attention, with the softmax in float32.

    Args:
        query: (batch, queries, heads, channels).
        key: (batch, keys, heads, channels).
        value: (batch, keys, heads, channels).
        causal: query i sees keys 0..i only.

    Returns:
        (batch, queries, heads, channels) in the query's dtype.
    """
    if jax.default_backend() != "cpu":
        return flash.attend(query, key, value, causal=causal)
    if not causal and query.shape[1] * key.shape[1] > SHORT:
        return _attention_by_head(query, key, value)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if causal:
        visible = jnp.tri(query.shape[1], key.shape[1], dtype=bool)
        scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, preferred_element_type=jnp.float32).astype(query.dtype)


def _attention_by_head(query: Array, key: Array, value: Array) -> Array:
    """Score a block of one head at a time, with plain matrix products.

    XLA's CPU backend runs a batched product with materialised scores several times slower than this
    (4,096 tokens, 8 heads of 40: 25 against 140 GFLOP/s).
    """
    batch, queries, heads, channels = query.shape
    rows = min(queries, QUERIES_AT_ONCE)
    blocks = -(-queries // rows)
    padded = jnp.pad(query * jnp.asarray(channels**-0.5, query.dtype), _behind(1, blocks * rows - queries))

    def one_head(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head
        seen: Array = lax.map(lambda block: _attend(block, k, v), q.reshape(blocks, rows, channels))
        return seen

    with_ones = jnp.pad(value, _behind(3, 1), constant_values=1)
    heads_apart = tuple(x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], -1) for x in (padded, key, with_ones))
    out: Array = lax.map(one_head, heads_apart)
    return out.reshape(batch, heads, blocks * rows, channels)[:, :, :queries].swapaxes(1, 2)


class _Softmax(NamedTuple):
    """A softmax's average over the keys seen so far: the largest score, and sums of weights relative to it.

    The online softmax of Milakov and Gimelshein (2018, arXiv 1805.02867). The last column of `weighted` is of values
    that are all one: the sum of the weights, which costs next to nothing within the product.
    """

    largest: Array
    weighted: Array

    def update(self, scores: Array, value: Array) -> "_Softmax":
        # Any shift cancels out, in the derivative too.
        largest = jnp.maximum(self.largest, lax.stop_gradient(scores).max(1, keepdims=True))
        weights, kept = exp_of_negative(scores - largest), exp_of_negative(self.largest - largest)
        weighted = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return _Softmax(largest, kept * self.weighted + weighted)


def _attend(query: Array, key: Array, value: Array) -> Array:
    """One head's queries (rows, channels), already scaled, over its keys (keys, channels) and values, the last one 1.

    value: (keys, channels + 1). Returns (rows, channels).
    """
    count = key.shape[0]
    blocks = -(-count // KEYS_AT_ONCE)
    size = -(-count // blocks)
    missing = blocks * size - count
    nothing = jnp.zeros((query.shape[0], 1), jnp.float32)
    start = _Softmax(nothing - jnp.inf, jnp.zeros((query.shape[0], value.shape[1]), jnp.float32))

    def update(state: _Softmax, block: tuple[Array, Array, Array]) -> tuple[_Softmax, None]:
        index, k, v = block
        scores = accumulate(query, k)
        if missing:
            scores = jnp.where(index * size + jnp.arange(size) < count, scores, -jnp.inf)
        return state.update(scores, v), None

    keys, values = (jnp.pad(x, _behind(0, missing, 2)).reshape(blocks, size, -1) for x in (key, value))
    if blocks == 1:
        end, _ = update(start, (jnp.int32(0), key, value))
    else:
        end, _ = lax.scan(update, start, (jnp.arange(blocks), keys, values))
    return (end.weighted[:, :-1] / end.weighted[:, -1:]).astype(value.dtype)


def _behind(axis: int, count: int, axes: int = 4) -> list[tuple[int, int]]:
    """What `jnp.pad` takes to add `count` zeros at the end of an axis."""
    return [(0, count if i == axis else 0) for i in range(axes)]


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

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """Attend to `context` (batch, keys, context_channels), or to `x` where it is None."""
        context = x if context is None else context
        query, key, value = (
            y.reshape(*y.shape[:-1], self.heads, -1) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attention(query, key, value).reshape(x.shape))


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
