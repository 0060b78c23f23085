"""The exponential of softmaxes is the exponential, and so is its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.models.kernels.exponential import exp_of_negative

SMALLEST = float(np.finfo(np.float32).tiny)


@settings(deadline=None)
@given(x=st.floats(-87.0, 0.0, width=32))
def test_it_is_the_exponential_to_float32s_precision(x):
    assert float(exp_of_negative(jnp.float32(x))) == pytest.approx(np.exp(x), rel=2.5e-7 - 1.2e-7 * x)


@pytest.mark.parametrize("x", [-88.0, -1e30, -np.inf])
def test_what_is_too_small_is_the_smallest_normal_number(x):
    assert float(exp_of_negative(jnp.float32(x))) == pytest.approx(SMALLEST)


def test_nan_stays():
    assert np.isnan(jax.jit(exp_of_negative)(jnp.float32(np.nan)))


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd, lambda f: jax.grad(jax.grad(f))])
def test_its_derivatives_are_itself(derivative):
    x = jnp.float32(-1.25)
    assert float(derivative(exp_of_negative)(x)) == pytest.approx(np.exp(-1.25), rel=3e-7)
