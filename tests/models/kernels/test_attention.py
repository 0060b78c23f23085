"""However a softmax is cut into blocks, it is the plain softmax, and so are its derivatives."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.models.kernels.attention import Blocks, Whole, attention


def plain(query, key, value):
    """The definition, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)


def arrays(batch, queries, keys, heads, channels, scale=1.0):
    rng = np.random.default_rng(queries + keys)
    query = scale * rng.standard_normal((batch, queries, heads, channels))
    return tuple(
        x.astype(np.float32) for x in (query, *(rng.standard_normal((batch, keys, heads, channels)) for _ in range(2)))
    )


SMALL = Blocks(queries=4, keys=5)


@settings(max_examples=25, deadline=None)
@given(sizes=st.tuples(*(st.integers(1, most) for most in (2, 23, 23, 3, 6))), at_once=st.integers(1, 9))
def test_any_size_gives_the_plain_softmax(sizes, at_once):
    query, key, value = arrays(*sizes)
    output = attention(query, key, value, form=Blocks(at_once, at_once + 1))
    np.testing.assert_allclose(output, plain(query, key, value), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
@pytest.mark.parametrize("form", [SMALL, Whole()], ids=["blocks", "whole"])
def test_large_scores_neither_overflow_nor_vanish(form, scale):
    query, key, value = arrays(1, 9, 17, 2, 8, scale=scale)
    output = attention(query, key, value, form=form)
    np.testing.assert_allclose(output, plain(query, key, value), atol=1e-3, rtol=0)


def test_derivatives_are_those_of_the_plain_softmax():
    query, key, value = arrays(2, 9, 13, 2, 8)
    cotangent = np.random.default_rng(0).standard_normal(query.shape)

    def loss(function):
        return lambda *inputs: jnp.vdot(function(*inputs), cotangent.astype(np.float32))

    def softmax(query, key, value):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    own, expected = (jax.grad(loss(f), (0, 1, 2))(query, key, value) for f in (partial(attention, form=SMALL), softmax))
    for ours, theirs in zip(own, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_the_blocks_of_a_real_size_agree_with_the_definition():
    query, key, value = arrays(1, 300, 1100, 1, 8)
    output = attention(query, key, value, form=Blocks(4096, 512))
    np.testing.assert_allclose(output, plain(query, key, value), atol=1e-5, rtol=0)


def test_blocks_are_not_causal():
    query, key, value = arrays(1, 9, 9, 2, 8)
    with pytest.raises(ValueError, match=re.escape("take Whole()")):
        attention(query, key, value, form=SMALL, causal=True)
