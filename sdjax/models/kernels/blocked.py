"""Attention in blocks of queries and keys with an online softmax: what a CPU computes fastest."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from sdjax.models.kernels.exponential import exp_of_negative
from sdjax.models.kernels.product import accumulate


def attend(query: Array, key: Array, value: Array, *, queries_at_once: int, keys_at_once: int) -> Array:
    """Score a block of one head at a time, with plain matrix products.

    XLA's CPU backend runs a batched product with materialised scores several times slower
    (4,096 tokens, 8 heads of 40: 25 against 140 GFLOP/s).

    Args:
        query: (batch, queries, heads, channels).
        key: (batch, keys, heads, channels).
        value: (batch, keys, heads, channels).
        queries_at_once: of a block.
        keys_at_once: of a block, at most.

    Returns:
        (batch, queries, heads, channels) in the query's dtype.
    """
    batch, queries, heads, channels = query.shape
    rows = min(queries, queries_at_once)
    blocks = -(-queries // rows)
    padded = jnp.pad(query * jnp.asarray(channels**-0.5, query.dtype), _behind(1, blocks * rows - queries))

    def one_head(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head
        seen: Array = lax.map(lambda block: _attend(block, k, v, keys_at_once), q.reshape(blocks, rows, channels))
        return seen

    with_ones = jnp.pad(value, _behind(3, 1), constant_values=1)
    heads_apart = tuple(x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], -1) for x in (padded, key, with_ones))
    out: Array = lax.map(one_head, heads_apart)
    return out.reshape(batch, heads, blocks * rows, channels)[:, :, :queries].swapaxes(1, 2)


class _Softmax(NamedTuple):
    """A softmax's average over the keys so far: the largest score, and sums of weights relative to it.

    The online softmax of Milakov and Gimelshein (2018, arXiv 1805.02867). The last column of `weighted` belongs to
    values that are all 1: it is the sum of the weights, at next to no cost within the product.
    """

    largest: Array
    weighted: Array

    def update(self, scores: Array, value: Array) -> "_Softmax":
        # Any shift cancels out, in the derivative too.
        largest = jnp.maximum(self.largest, lax.stop_gradient(scores).max(1, keepdims=True))
        weights, kept = exp_of_negative(scores - largest), exp_of_negative(self.largest - largest)
        weighted = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return _Softmax(largest, kept * self.weighted + weighted)


def _attend(query: Array, key: Array, value: Array, keys_at_once: int) -> Array:
    """One head's queries (rows, channels), already scaled, over its keys (keys, channels) and values, the last one 1.

    value: (keys, channels + 1). Returns (rows, channels).
    """
    count = key.shape[0]
    blocks = -(-count // keys_at_once)
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
    """Give the padding of `jnp.pad` that adds `count` zeros at the end of an axis."""
    return [(0, count if i == axis else 0) for i in range(axes)]
