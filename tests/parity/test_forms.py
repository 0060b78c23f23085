"""Every form of convolution and attention keeps parity with PyTorch, at the tolerance of the architectures' tests."""

import jax
import numpy as np
import pytest
import torch
from reference import channels_first, channels_last, pipeline

import sdjax
from sdjax.models import attention, bind, convolution
from sdjax.models.convolution import Form

TOLERANCE = 1e-4
CHOOSE = convolution.choose


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    reference = pipeline("sd-v1-5", folder)
    return reference, sdjax.Pipeline.from_pretrained(folder / "model")


@pytest.fixture(
    params=[
        (Form.DIRECT, 2**30),
        (Form.COLUMNS, 0),
        (Form.PLACES, 2**30),
        (Form.WINOGRAD_2, 2**30),
        (Form.WINOGRAD_4, 0),
    ],
    ids=lambda value: f"{value[0].name}-{'blocks' if value[1] == 0 else 'whole'}",
)
def forms(request, monkeypatch):
    """One form for all 3x3 convolutions, and attention whole or in blocks of a few queries and keys."""
    form, short = request.param

    def chosen(picture, weight, *, stride, padding, **rest):
        if weight[2] == 3 and stride == 1 and padding == (1, 1):
            return form
        return CHOOSE(picture, weight, stride=stride, padding=padding, **rest)

    monkeypatch.setattr(convolution, "choose", chosen)
    for name, value in {"SHORT": short, "QUERIES_AT_ONCE": 16, "KEYS_AT_ONCE": 10}.items():
        monkeypatch.setattr(attention, name, value)


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
    output = compiled(lambda params: bind(pipe.definition.unet, params)(sample, timesteps, context))(
        pipe.params["unet"]
    )
    np.testing.assert_allclose(output, channels_last(expected), atol=TOLERANCE, rtol=0)


def test_decoder_agrees(both, forms):
    reference, pipe = both
    latents = np.random.default_rng(2).normal(size=(1, 5, 7, 4)).astype(np.float32)
    with torch.no_grad():
        expected = reference.vae.decode(channels_first(latents)).sample
    output = compiled(lambda params: bind(pipe.definition.vae, params).decode(latents))(pipe.params["vae"])
    np.testing.assert_allclose(output, channels_last(expected), atol=TOLERANCE, rtol=0)
