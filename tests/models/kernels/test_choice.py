"""The form of a kernel follows from target and shape, so it is checked without the device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.devices.target import CPU, Target, local_target
from sdjax.models.kernels import attend, convolve, forms_for
from sdjax.models.kernels.attention import Blocks, Library, Whole, attention, padding
from sdjax.models.kernels.convolution import Columns, Direct, Places, Winograd

AMPERE, HOPPER, TURING = (Target("gpu", capability) for capability in ((8, 0), (9, 0), (7, 5)))
TPU = Target("tpu")
CUDNN, XLA, OWN = Library("cudnn"), Library("xla"), Direct("HWIO")


@pytest.mark.parametrize(
    ("target", "dtype", "tokens", "channels", "form"),
    [
        (HOPPER, "bfloat16", 4096, 40, CUDNN),  # SD 1.5 at 512 x 512
        (HOPPER, "float16", 1024, 80, CUDNN),
        (HOPPER, "bfloat16", 256, 160, CUDNN),
        (AMPERE, "bfloat16", 256, 160, XLA),  # wider than it takes
        (AMPERE, "bfloat16", 4096, 64, CUDNN),  # SD 2, SDXL
        (Target("gpu", (12, 0)), "bfloat16", 4096, 64, CUDNN),
        (HOPPER, "bfloat16", 4096, 42, CUDNN),  # padded to 48
        (AMPERE, "bfloat16", 4096, 127, CUDNN),
        (HOPPER, "bfloat16", 4096, 512, XLA),  # the autoencoder's one head
        (HOPPER, "float32", 4096, 64, XLA),
        (TURING, "float16", 4096, 64, XLA),
        (HOPPER, "bfloat16", 77, 64, XLA),  # a text encoder
        (Target("gpu"), "bfloat16", 4096, 64, XLA),  # an AMD GPU
        (TPU, "bfloat16", 4096, 64, XLA),
        (CPU, "bfloat16", 4096, 64, Blocks(4096, 512)),
        (CPU, "float32", 77, 64, Whole()),
    ],
)
def test_attention_follows_from_device_dtype_and_shape(target, dtype, tokens, channels, form):
    choose = forms_for(target).attention
    assert choose(queries=tokens, keys=tokens, channels=channels, dtype=dtype, causal=False) == form


@pytest.mark.parametrize(("channels", "more"), [(40, 0), (41, 7), (7, 1), (64, 0)])
def test_heads_are_padded_to_a_multiple_of_eight(channels, more):
    assert padding(channels) == more


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("channels", [5, 16, 42])
def test_padded_heads_give_the_same_attention(monkeypatch, channels, causal):
    rng = np.random.default_rng(channels)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 19, 3, channels)), jnp.float32) for _ in range(3))
    seen_by_kernel = []
    plain = jax.nn.dot_product_attention

    def without_cudnn(q, k, v, *, implementation, **rest):
        seen_by_kernel.append((implementation, q.shape[-1]))
        return plain(q, k, v, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    out = attention(query, key, value, form=CUDNN, causal=causal)
    assert seen_by_kernel == [("cudnn", channels + padding(channels))]
    np.testing.assert_allclose(out, attention(query, key, value, form=Whole(), causal=causal), atol=2e-6)


def test_the_local_target_is_the_default_device():
    assert jax.default_backend() == "cpu"
    assert local_target() == CPU


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("target", [TPU, Target("gpu")], ids=["tpu", "gpu"])
def test_accelerators_attend_as_a_cpu_does(target, causal):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((1, 33, 2, 12)), jnp.bfloat16) for _ in range(3)]
    ours, expected = (attend(forms_for(t), *arrays, causal=causal).astype(jnp.float32) for t in (target, CPU))
    np.testing.assert_allclose(ours, expected, atol=0.03)


def test_a_loop_gives_xlas_own_convolution_a_kernel_in_the_order_that_it_is_fast_in():
    rng = np.random.default_rng(7)
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((3, 8, 8, 16), (16, 16, 3, 3)))

    def convolved(row, weight):
        return convolve(forms_for(CPU), row[None], weight, stride=1, padding=(1, 1))

    each = jax.jit(lambda x, weight: jax.lax.map(lambda row: convolved(row, weight), x))
    orders = re.findall(r"dim_labels=b01f_(\w+)->", each.lower(x, weight).compile().as_text())
    assert orders == ["01io"]


def chosen(side, weight, target=CPU, *, stride=1, padding=(1, 1), dtype="float32"):
    return forms_for(target).convolution((side, side), weight, stride=stride, padding=padding, dtype=dtype)


@pytest.mark.parametrize("target", [HOPPER, TPU])
@pytest.mark.parametrize("weight", [(320, 320, 3, 3), (320, 4, 3, 3)])
def test_accelerators_keep_their_own_convolution(target, weight):
    assert chosen(64, weight, target) == Direct("OIHW")


@pytest.mark.parametrize(("stride", "padding"), [(2, (1, 1)), (2, (0, 1)), (1, (0, 0))])
def test_a_large_picture_is_halved_by_the_backends_own_form(stride, padding):
    assert chosen(64, (320, 320, 3, 3), stride=stride, padding=padding) == OWN


@pytest.mark.parametrize(
    ("side", "narrow", "wide", "expected"),
    [
        (64, 320, 320, 4),
        (32, 1280, 640, 2),
        (16, 1280, 1280, 2),
        (16, 2560, 1280, Columns()),
        (8, 1280, 1280, Columns()),
        (16, 256, 128, OWN),
        (256, 512, 256, 4),
        (256, 256, 128, 4),
        (512, 256, 128, 4),
        (1024, 256, 256, 4),
        (512, 128, 128, OWN),
    ],
)
def test_a_cpu_transforms_only_kernels_that_are_small_beside_their_picture(side, narrow, wide, expected):
    form = chosen(side, (wide, narrow, 3, 3))
    assert (form.tile if isinstance(form, Winograd) else form) == expected


@pytest.mark.parametrize(
    ("side", "stride", "expected"),
    [(64, 1, Places()), (64, 2, Places()), (16, 1, Places()), (16, 2, Columns()), (8, 1, Columns())],
)
def test_few_pixels_in_bfloat16_are_multiplied_place_by_place(side, stride, expected):
    assert chosen(side, (640, 640, 3, 3), stride=stride, dtype="bfloat16") == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("side", [96, 512])
def test_many_pixels_in_half_precision_are_transformed(side, dtype):
    assert chosen(side, (640, 320, 3, 3), dtype=dtype).tile == 4


@pytest.mark.parametrize(("side", "strip"), [(64, 16), (108, 27), (112, 7), (512, 2)])
def test_large_pictures_are_transformed_in_strips(side, strip):
    assert chosen(side, (640, 320, 3, 3)).strip == strip


@pytest.mark.parametrize(("wide", "in_place"), [(320, True), (200, False)])
def test_a_large_kernel_is_transformed_where_it_is_used(wide, in_place):
    assert chosen(64, (wide, 320, 3, 3)).in_place == in_place
