"""Scaled dot-product attention, and the forms in which it is computed. `forms` chooses the form."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.models.kernels import blocked

MULTIPLE = 8
"""cuDNN's flash attention takes heads of a multiple of 8 channels."""


@dataclass(frozen=True)
class Whole:
    """All scores at once, by matrix products summed in float32."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of one head's queries and keys with an online softmax (`blocked`); not causal.

    Attributes:
        queries: of a block.
        keys: of a block.
    """

    queries: int
    keys: int


@dataclass(frozen=True)
class Library:
    """`jax.nn.dot_product_attention` by cuDNN's flash attention or by XLA."""

    implementation: Literal["cudnn", "xla"]


Form: TypeAlias = Whole | Blocks | Library
"""All forms give the same numbers, up to rounding."""


def attention(query: Array, key: Array, value: Array, *, form: Form, causal: bool = False) -> Array:
    """Attend, with the softmax in float32.

    Args:
        query: (batch, queries, heads, channels).
        key: (batch, keys, heads, channels).
        value: (batch, keys, heads, channels).
        form: one that can compute these.
        causal: query i sees keys 0..i only.

    Returns:
        (batch, queries, heads, channels) in the query's dtype.
    """
    match form:
        case Whole():
            return _whole(query, key, value, causal)
        case Blocks(queries, keys):
            if causal:
                raise ValueError("attention in blocks is not causal: take Whole()")
            return blocked.attend(query, key, value, queries_at_once=queries, keys_at_once=keys)
        case Library(implementation):
            return _by_library(query, key, value, causal, implementation)


def padding(channels: int) -> int:
    """Count the channels of zeros that make a head a multiple of 8. They change no score, and are cut off again."""
    return -channels % MULTIPLE


def _whole(query: Array, key: Array, value: Array, causal: bool) -> Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if causal:
        visible = jnp.tri(query.shape[1], key.shape[1], dtype=bool)
        scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, preferred_element_type=jnp.float32).astype(query.dtype)


def _by_library(query: Array, key: Array, value: Array, causal: bool, implementation: Literal["cudnn", "xla"]) -> Array:
    channels = query.shape[-1]
    more = padding(channels) if implementation == "cudnn" else 0
    if more:
        query, key, value = (jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) for x in (query, key, value))
    # The scale is that of the head without padding.
    seen: Array = jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, scale=channels**-0.5, implementation=implementation
    )
    return seen[..., :channels]
