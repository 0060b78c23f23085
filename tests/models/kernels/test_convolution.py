"""Every form of a convolution gives the numbers, and the derivatives, of XLA's own."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.devices.staging import split
from sdjax.models.kernels.convolution import Columns, Direct, Places, Winograd, conv2d

FORMS = (
    Direct("OIHW"),
    Direct("HWIO"),
    Places(),
    Columns(),
    Winograd(2, strip=4096, in_place=False),
    Winograd(4, strip=4096, in_place=True),
)
TOLERANCE = 1e-4


@pytest.fixture(params=FORMS, ids=str)
def form(request):
    return request.param


def in_strips(form, strip, *, in_place):
    """A form of Winograd in strips of so many rows of tiles; any other as it is."""
    return replace(form, strip=strip, in_place=in_place) if isinstance(form, Winograd) else form


def arrays(seed, batch, height, width, narrow, wide):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, height, width, narrow), np.float32)
    weight = rng.standard_normal((wide, narrow, 3, 3), np.float32) / np.float32(9 * narrow) ** 0.5
    return x, weight


def convolved(x, weight, form):
    return compiled(lambda x, weight: conv2d(x, weight, stride=1, padding=(1, 1), form=form))(x, weight)


def compiled(function):
    """Without optimisation, which takes longer here than it saves."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


SHAPES = st.tuples(*(st.integers(1, most) for most in (3, 13, 13, 9, 9)))


@settings(max_examples=5, deadline=None)
@given(shape=SHAPES, strip=st.integers(1, 4), in_place=st.booleans(), seed=st.integers(0, 99))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_any_size_gives_what_pytorch_gives(form, shape, strip, in_place, seed):
    x, weight = arrays(seed, *shape)
    output = convolved(x, weight, in_strips(form, strip, in_place=in_place))
    truth = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)).double(),
        torch.from_numpy(weight).double(),
        padding=1,
    )
    np.testing.assert_allclose(output, truth.numpy().transpose(0, 2, 3, 1), atol=TOLERANCE, rtol=0)


@settings(max_examples=5, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
@pytest.mark.parametrize("form", [Places(), Columns()], ids=str)
def test_any_size_is_halved_as_pytorch_halves_it(form, shape, seed):
    x, weight = arrays(seed, *shape)
    output = compiled(lambda x, weight: conv2d(x, weight, stride=2, padding=(1, 1), form=form))(x, weight)
    truth = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)).double(), torch.from_numpy(weight).double(), stride=2, padding=1
    )
    np.testing.assert_allclose(output, truth.numpy().transpose(0, 2, 3, 1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("strip", "in_place"), [(1, True), (1, False), (4096, True)])
def test_derivatives_are_those_of_xlas_own_convolution(form, strip, in_place):
    form = in_strips(form, strip, in_place=in_place)
    x, weight = arrays(3, 2, 11, 9, 5, 7)
    cotangent = np.random.default_rng(4).standard_normal((2, 11, 9, 7), np.float32)

    def derivatives(convolve):
        return compiled(jax.grad(lambda x, weight: jnp.vdot(convolve(x, weight), cotangent), (0, 1)))(x, weight)

    plain = derivatives(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC"))
    )
    own = derivatives(lambda x, k: conv2d(x, k, stride=1, padding=(1, 1), form=form))
    for ours, expected in zip(own, plain, strict=True):
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


def test_wide_kernels_stay_as_exact_as_narrow_ones(form):
    x, weight = arrays(5, 1, 16, 16, 640, 64)
    truth = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)).double(),
        torch.from_numpy(weight).double(),
        padding=1,
    )
    np.testing.assert_allclose(convolved(x, weight, form), truth.numpy().transpose(0, 2, 3, 1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("dtype", "allowed"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 1e-4)])
def test_no_form_adds_to_what_half_precision_loses(form, dtype, allowed):
    x, weight = (jnp.asarray(array, dtype) for array in arrays(6, 1, 64, 64, 320, 320))
    truth = torch.nn.functional.conv2d(
        torch.from_numpy(np.asarray(x, np.float64).transpose(0, 3, 1, 2)),
        torch.from_numpy(np.asarray(weight, np.float64)),
        padding=1,
    )
    error = np.asarray(convolved(x, weight, form), np.float64) - truth.numpy().transpose(0, 2, 3, 1)
    assert np.sqrt(np.square(error).mean()) < allowed  # of outputs of order one, rounded to the dtype


@pytest.mark.parametrize("in_place", [False, True])
def test_a_kernel_that_is_transformed_where_it_is_used_is_not_kept_before_a_loop(in_place):
    form = Winograd(2, strip=4096, in_place=in_place)
    x, weight = arrays(5, 1, 16, 16, 64, 64)
    early, late = split(lambda weight, x: conv2d(x, weight, stride=1, padding=(1, 1), form=form), weight, x)
    kept = early(weight)
    assert bool(kept) != in_place
    np.testing.assert_allclose(late(weight, kept, x), convolved(x, weight, form), atol=TOLERANCE, rtol=0)
