"""Every form of a convolution gives the numbers, and the derivatives, of XLA's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.models import convolution
from sdjax.models.convolution import Form, choose, conv2d
from sdjax.staging import split

FORMS = (Form.DIRECT, Form.PLACES, Form.COLUMNS, Form.WINOGRAD_2, Form.WINOGRAD_4)
TOLERANCE = 1e-4


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def form(request, monkeypatch):
    monkeypatch.setattr(convolution, "choose", lambda *_, **__: request.param)
    return request.param


def arrays(seed, batch, height, width, narrow, wide):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, height, width, narrow), np.float32)
    weight = rng.standard_normal((wide, narrow, 3, 3), np.float32) / np.float32(9 * narrow) ** 0.5
    return x, weight


def convolved(x, weight):
    return compiled(lambda x, weight: conv2d(x, weight, stride=1, padding=(1, 1)))(x, weight)


def compiled(function):
    """Without optimisation, which takes longer here than it saves."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


SHAPES = st.tuples(*(st.integers(1, most) for most in (3, 13, 13, 9, 9)))


@settings(max_examples=5, deadline=None)
@given(shape=SHAPES, strip=st.integers(1, 9), prepared=st.sampled_from([0, 2**16]), seed=st.integers(0, 99))
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_any_size_gives_what_pytorch_gives(form, shape, strip, prepared, seed):
    x, weight = arrays(seed, *shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "choose", lambda *_, **__: form)
        patch.setattr(convolution, "LARGEST_WHOLE", strip)
        patch.setattr(convolution, "TILES_OF_STRIP", strip)
        patch.setattr(convolution, "LARGEST_PREPARED", prepared)
        output = convolved(x, weight)
    truth = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)).double(),
        torch.from_numpy(weight).double(),
        padding=1,
    )
    np.testing.assert_allclose(output, truth.numpy().transpose(0, 2, 3, 1), atol=TOLERANCE, rtol=0)


@settings(max_examples=5, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
@pytest.mark.parametrize("form", [Form.PLACES, Form.COLUMNS], ids=lambda form: form.name)
def test_any_size_is_halved_as_pytorch_halves_it(form, shape, seed):
    x, weight = arrays(seed, *shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "choose", lambda *_, **__: form)
        output = compiled(lambda x, weight: conv2d(x, weight, stride=2, padding=(1, 1)))(x, weight)
    truth = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)).double(), torch.from_numpy(weight).double(), stride=2, padding=1
    )
    np.testing.assert_allclose(output, truth.numpy().transpose(0, 2, 3, 1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("strip", "prepared"), [(4, 0), (4, 2**16), (4096, 0)])
def test_derivatives_are_those_of_xlas_own_convolution(form, strip, prepared, monkeypatch):
    monkeypatch.setattr(convolution, "LARGEST_WHOLE", strip)
    monkeypatch.setattr(convolution, "TILES_OF_STRIP", strip)
    monkeypatch.setattr(convolution, "LARGEST_PREPARED", prepared)
    x, weight = arrays(3, 2, 11, 9, 5, 7)
    cotangent = np.random.default_rng(4).standard_normal((2, 11, 9, 7), np.float32)

    def derivatives(convolve):
        return compiled(jax.grad(lambda x, weight: jnp.vdot(convolve(x, weight), cotangent), (0, 1)))(x, weight)

    plain = derivatives(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC"))
    )
    own = derivatives(lambda x, k: conv2d(x, k, stride=1, padding=(1, 1)))
    for ours, expected in zip(own, plain, strict=True):
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


def test_wide_kernels_stay_as_exact_as_narrow_ones(form):
    x, weight = arrays(5, 1, 16, 16, 640, 64)
    truth = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)).double(),
        torch.from_numpy(weight).double(),
        padding=1,
    )
    np.testing.assert_allclose(convolved(x, weight), truth.numpy().transpose(0, 2, 3, 1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("dtype", "allowed"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 1e-4)])
def test_no_form_adds_to_what_half_precision_loses(form, dtype, allowed):
    x, weight = (jnp.asarray(array, dtype) for array in arrays(6, 1, 64, 64, 320, 320))
    truth = torch.nn.functional.conv2d(
        torch.from_numpy(np.asarray(x, np.float64).transpose(0, 3, 1, 2)),
        torch.from_numpy(np.asarray(weight, np.float64)),
        padding=1,
    )
    error = np.asarray(convolved(x, weight), np.float64) - truth.numpy().transpose(0, 2, 3, 1)
    assert np.sqrt(np.square(error).mean()) < allowed  # of outputs of order one, rounded to the dtype


def test_a_loop_gives_xlas_own_convolution_a_kernel_in_the_order_that_it_is_fast_in():
    x, weight = arrays(7, 3, 8, 8, 16, 16)
    each = jax.jit(lambda x, weight: jax.lax.map(lambda row: conv2d(row[None], weight, stride=1, padding=(1, 1)), x))
    orders = re.findall(r"dim_labels=b01f_(\w+)->", each.lower(x, weight).compile().as_text())
    assert orders == ["01io"]


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize("weight", [(320, 320, 3, 3), (320, 4, 3, 3)])
def test_accelerators_keep_their_own_convolution(backend, weight):
    assert choose((64, 64), weight, stride=1, padding=(1, 1), dtype="float32", backend=backend) is Form.DIRECT


@pytest.mark.parametrize(("stride", "padding"), [(2, (1, 1)), (2, (0, 1)), (1, (0, 0))])
def test_a_large_picture_is_halved_by_the_backends_own_form(stride, padding):
    assert (
        choose((64, 64), (320, 320, 3, 3), stride=stride, padding=padding, dtype="float32", backend="cpu")
        is Form.DIRECT
    )


@pytest.mark.parametrize(
    ("side", "narrow", "wide", "expected"),
    [
        (64, 320, 320, Form.WINOGRAD_4),
        (32, 1280, 640, Form.WINOGRAD_2),
        (16, 1280, 1280, Form.WINOGRAD_2),
        (16, 2560, 1280, Form.COLUMNS),
        (8, 1280, 1280, Form.COLUMNS),
        (16, 256, 128, Form.DIRECT),
        (256, 512, 256, Form.WINOGRAD_4),
        (256, 256, 128, Form.WINOGRAD_4),
        (512, 256, 128, Form.WINOGRAD_4),
        (1024, 256, 256, Form.WINOGRAD_4),
        (512, 128, 128, Form.DIRECT),
    ],
)
def test_a_cpu_transforms_only_kernels_that_are_small_beside_their_picture(side, narrow, wide, expected):
    assert (
        choose((side, side), (wide, narrow, 3, 3), stride=1, padding=(1, 1), dtype="float32", backend="cpu") is expected
    )


@pytest.mark.parametrize(
    ("side", "stride", "expected"),
    [(64, 1, Form.PLACES), (64, 2, Form.PLACES), (16, 1, Form.PLACES), (16, 2, Form.COLUMNS), (8, 1, Form.COLUMNS)],
)
def test_few_pixels_in_bfloat16_are_multiplied_place_by_place(side, stride, expected):
    assert (
        choose((side, side), (640, 640, 3, 3), stride=stride, padding=(1, 1), dtype="bfloat16", backend="cpu")
        is expected
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("side", [96, 512])
def test_many_pixels_in_half_precision_are_transformed(side, dtype):
    weight = (640, 320, 3, 3)
    assert choose((side, side), weight, stride=1, padding=(1, 1), dtype=dtype, backend="cpu") is Form.WINOGRAD_4


@pytest.mark.parametrize(("wide", "prepared"), [(64, True), (128, False)])
def test_a_large_kernel_is_transformed_when_it_is_used(wide, prepared, monkeypatch):
    monkeypatch.setattr(convolution, "choose", lambda *_, **__: Form.WINOGRAD_2)
    monkeypatch.setattr(convolution, "LARGEST_PREPARED", 64 * 64)
    x, weight = arrays(5, 1, 16, 16, 64, wide)
    early, late = split(lambda weight, x: conv2d(x, weight, stride=1, padding=(1, 1)), weight, x)
    kept = early(weight)
    assert bool(kept) == prepared
    np.testing.assert_allclose(late(weight, kept, x), convolved(x, weight), atol=TOLERANCE, rtol=0)
