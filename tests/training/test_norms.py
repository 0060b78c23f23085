"""Native group norms give what the package's own give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import UNet, bind, initialise
from training import diffusion, norms
from training.norms import group_norm, with_native_norms


@pytest.fixture
def plain():
    """`group_norm` in plain operations."""

    def normalise(groups, epsilon, x, weight, bias):
        grouped = x.reshape(*x.shape[:2], groups, -1)
        mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        return ((grouped - mean) / jnp.sqrt(variance + epsilon)).reshape(x.shape) * weight + bias

    return normalise


@pytest.mark.parametrize("sizes", [(1, 1, 8, 2), (3, 100, 24, 8), (5, 16, 96, 8), (2, 4096, 6, 3)])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_norm_and_its_derivatives_are_right(plain, sizes, mean):
    if not norms.available():
        return
    batch, pixels, channels, groups = sizes
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 2, (batch, pixels, channels)).astype(np.float32)
    weight, bias = rng.normal(1, 0.3, (2, channels)).astype(np.float32)
    target = rng.normal(size=x.shape).astype(np.float32)

    def loss(norm):
        return lambda *args: jnp.square(norm(groups, 1e-5, *args) - target).sum()

    got, expected = (jax.value_and_grad(loss(norm), argnums=(0, 1, 2))(x, weight, bias) for norm in (group_norm, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))


def test_a_network_with_native_norms_is_the_same_network():
    rng = np.random.default_rng(1)
    params = initialise(UNet, diffusion.CONFIG, dtype="float32", seed=0)
    latents = rng.normal(size=(2, 16, 16, diffusion.CONFIG.in_channels)).astype(np.float32)
    context = rng.normal(size=(2, 5, diffusion.CONFIG.context_channels)).astype(np.float32)
    asked = latents, np.int32([10, 900]), context
    expected = bind(diffusion.DEFINITION, params)(*asked)
    np.testing.assert_allclose(with_native_norms(bind(diffusion.DEFINITION, params))(*asked), expected, atol=1e-4)
    np.testing.assert_array_equal(bind(diffusion.DEFINITION, params)(*asked), expected)


def test_without_the_kernels_the_network_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(norms, "available", lambda: False)
    params = initialise(UNet, diffusion.CONFIG, dtype="float32", seed=0)
    module = with_native_norms(bind(diffusion.DEFINITION, params))
    assert type(module.conv_norm_out).__name__ == "GroupNorm"
