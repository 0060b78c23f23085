"""Whether or not this processor has the instructions, the function and its derivatives stay what they were."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from training import diffusion, products
from training.products import with_half_products

SAME = ((1, 1), (1, 1))
CONVOLUTIONS = [(1, SAME, 3), (2, SAME, 3), (2, ((0, 1), (0, 1)), 3), (1, ((0, 0), (0, 0)), 1)]
"""Stride, padding and size of those that the models have."""


def assert_close(got, expected):
    """To the rounding of bfloat16 factors, relative to the largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()) + 1e-6)


def convolution(stride, padding):
    def convolve(x, weight):
        out = jax.lax.conv_general_dilated(
            x, weight, (stride, stride), padding, dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        return out, jnp.square(out).sum()

    return convolve


@pytest.mark.parametrize("sizes", [(3, 6, 10, 3, 10), (2, 16, 16, 96, 40), (5, 4, 4, 33, 64), (1, 40, 36, 32, 8)])
@pytest.mark.parametrize(
    ("stride", "padding", "size"),
    CONVOLUTIONS,
)
def test_a_convolution_and_its_derivatives_are_right(sizes, stride, padding, size):
    batch, height, width, channels, out = sizes
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, height, width, channels)).astype(np.float32)
    weight = rng.normal(size=(out, channels, size, size)).astype(np.float32)
    plain = convolution(stride, padding)
    half = with_half_products(plain)
    assert_close(half(x, weight)[0], plain(x, weight)[0])
    gradients = [jax.grad(lambda x, w, f=f: f(x, w)[1], argnums=(0, 1))(x, weight) for f in (half, plain)]
    assert_close(*gradients)


@pytest.mark.parametrize("rows", [1, 7, 96, 512])
def test_a_product_and_its_derivatives_are_right(rows):
    rng = np.random.default_rng(1)
    x, weight = (rng.normal(size=size).astype(np.float32) for size in ((2, rows, 33), (20, 33)))

    def plain(x, weight):
        return jnp.square(jnp.tanh(x @ weight.T / 6)).sum()

    gradients = [jax.grad(f, argnums=(0, 1))(x, weight) for f in (with_half_products(plain), plain)]
    assert_close(*gradients)


def test_a_training_step_s_gradient_is_that_of_the_plain_function():
    """All together, of the models as they are trained: the angle to the exact gradient is small."""
    rng = np.random.default_rng(2)
    params = diffusion.initial_state(1).params
    params = jax.tree.map(lambda leaf: leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32), params)
    latents = rng.normal(size=(2, 16, 16, 8)).astype(np.float32)
    batch = diffusion.Batch(latents, np.zeros((2, 32), np.int32), np.int32([200, 700]))
    context = rng.normal(size=(2, 32, diffusion.text.CONFIG.hidden_size)).astype(np.float32)
    half, plain = (
        jax.flatten_util.ravel_pytree(jax.jit(jax.grad(loss))(params, batch, context, jax.random.key(0)))[0]
        for loss in (with_half_products(diffusion.velocity_loss), diffusion.velocity_loss)
    )
    assert float(half @ plain / jnp.linalg.norm(half) / jnp.linalg.norm(plain)) > 0.999


def test_the_same_step_gives_the_same_numbers():
    rng = np.random.default_rng(3)
    x, weight = rng.normal(size=(6, 8, 8, 24)).astype(np.float32), rng.normal(size=(24, 24, 3, 3)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda w: with_half_products(convolution(1, ((1, 1), (1, 1))))(x, w)[1]))
    assert np.array_equal(gradient(weight), gradient(weight))


def test_without_the_instructions_the_function_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(products, "available", lambda: False)
    assert with_half_products(len) is len
