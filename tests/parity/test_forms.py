"""Every form of convolution and attention keeps parity with PyTorch, at the tolerance of the architectures' tests."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from reference import channels_first, channels_last, pipeline

import sdjax
from sdjax.devices.target import CPU
from sdjax.models import bind
from sdjax.models.kernels import forms_for
from sdjax.models.kernels.attention import Blocks, Whole
from sdjax.models.kernels.convolution import Columns, Direct, Places, Winograd

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    reference = pipeline("sd-v1-5", folder)
    return reference, sdjax.Pipeline.from_pretrained(folder / "model")


@pytest.fixture(
    params=[
        (Direct("HWIO"), Whole()),
        (Columns(), Blocks(16, 10)),
        (Places(), Whole()),
        (Winograd(2, strip=1, in_place=False), Whole()),
        (Winograd(4, strip=4096, in_place=True), Blocks(16, 10)),
    ],
    ids=str,
)
def forms(request):
    """One form for all 3x3 convolutions, and one for attention."""
    convolution, attention = request.param
    own = forms_for(CPU)

    def chosen(picture, weight, *, stride, padding, dtype):
        if weight[2] == 3 and stride == 1 and padding == (1, 1):
            return convolution
        return own.convolution(picture, weight, stride=stride, padding=padding, dtype=dtype)

    return replace(own, convolution=chosen, attention=lambda **_: attention)


def compiled(function):
    """Without optimisation, which takes longer here than it saves."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def test_unet_agrees(both, forms):
    reference, pipe = both
    rng = np.random.default_rng(1)
    sample = rng.normal(size=(2, 9, 13, 4)).astype(np.float32)
    timesteps = np.array([7.0, 981.5], np.float32)
    context = rng.normal(size=(2, 7, 32)).astype(np.float32)
    with torch.no_grad():
        expected = reference.unet(channels_first(sample), torch.from_numpy(timesteps), torch.from_numpy(context)).sample
    output = compiled(
        lambda params: bind(replace(pipe.definition.denoiser, forms=forms), params)(sample, timesteps, context)
    )(pipe.params["unet"])
    np.testing.assert_allclose(output, channels_last(expected), atol=TOLERANCE, rtol=0)


def test_decoder_agrees(both, forms):
    reference, pipe = both
    latents = np.random.default_rng(2).normal(size=(1, 5, 7, 4)).astype(np.float32)
    with torch.no_grad():
        expected = reference.vae.decode(channels_first(latents)).sample
    output = compiled(lambda params: bind(replace(pipe.definition.vae, forms=forms), params).decode(latents))(
        pipe.params["vae"]
    )
    np.testing.assert_allclose(output, channels_last(expected), atol=TOLERANCE, rtol=0)
