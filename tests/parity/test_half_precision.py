"""Half precision loses what PyTorch's loses and no more, and SDXL's autoencoder stays within what float16 can say."""

import copy
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import channels_first, channels_last, pipeline

import sdjax
from sdjax.devices.target import CPU
from sdjax.errors import NotFiniteError
from sdjax.models import bind
from sdjax.models.kernels import forms_for
from sdjax.models.kernels.attention import Blocks, Whole
from sdjax.models.kernels.convolution import Columns, Direct, Places


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    reference = pipeline("sd-v1-5", folder)
    return reference, sdjax.Pipeline.from_pretrained(folder / "model", dtype="bfloat16")


@pytest.mark.parametrize("convolution", [Direct("HWIO"), Places(), Columns()], ids=str)
@pytest.mark.parametrize("attention", [Blocks(4096, 512), Whole()], ids=str)
def test_in_bfloat16_a_unet_strays_from_float32_no_further_than_pytorchs(both, convolution, attention):
    forms = replace(forms_for(CPU), convolution=lambda *_, **__: convolution, attention=lambda **_: attention)
    reference, pipe = both
    rng = np.random.default_rng(1)
    sample, context = (rng.normal(size=shape).astype(np.float32) for shape in [(2, 16, 16, 4), (2, 7, 32)])
    timesteps = np.array([7.0, 981.5], np.float32)
    with torch.no_grad():
        inputs = channels_first(sample), torch.from_numpy(timesteps), torch.from_numpy(context)
        exact = channels_last(reference.unet(*inputs).sample)
        half = copy.deepcopy(reference.unet).bfloat16()
        theirs = channels_last(half(*(x.bfloat16() for x in inputs)).sample.float())
    ours = jax.jit(
        lambda params: bind(replace(pipe.definition.denoiser, forms=forms), params)(sample, timesteps, context)
    )(pipe.params["unet"])
    assert rms(np.asarray(ours, np.float32) - exact) < 1.2 * rms(theirs - exact)


def rms(x):
    return np.sqrt(np.square(x).mean())


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    """A checkpoint whose autoencoder's inner values pass 65,504; the normalisation after them hides it in float32."""
    folder = tmp_path_factory.mktemp("fragile")
    reference = pipeline("sd-xl", folder)
    with torch.no_grad():
        for half in (reference.vae.encoder, reference.vae.decoder):
            half.conv_in.weight *= 2e5
    reference.vae.save_pretrained(folder / "model" / "vae")
    return reference, folder / "model"


def test_in_float16_pictures_are_read_and_drawn_as_in_float32(fragile):
    reference, folder = fragile
    pipe = sdjax.Pipeline.from_pretrained(folder, dtype="float16")
    assert {leaf.dtype for leaf in pipe.params["unet"]["conv_in"].values()} == {jnp.dtype("float16")}
    pictures = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        mean = reference.vae.encode(channels_first(pictures)).latent_dist.mean
        drawn = channels_last(reference.vae.decode(mean).sample)
    vae = bind(pipe.definition.vae, pipe.params["vae"])
    seen = vae.encode(pictures).mean
    np.testing.assert_allclose(seen, channels_last(mean), atol=1e-4, rtol=0)
    latents = channels_last(mean) * pipe.definition.vae_config.scaling_factor
    redrawn = sdjax.pipeline.decode(pipe.definition, pipe.params, latents)
    np.testing.assert_allclose(redrawn, np.clip(drawn / 2 + 0.5, 0, 1), atol=1e-4, rtol=0)


def test_a_whole_picture_in_float16_is_finite(fragile):
    _, folder = fragile
    picture = sdjax.Pipeline.from_pretrained(folder, dtype="float16")(
        "the cat", steps=2, seed=0, width=16, height=16, output="numpy"
    ).images[0]
    assert np.isfinite(picture).all()
    assert picture.std() > 0.01


def test_without_the_mark_an_overflow_is_an_error_and_not_a_black_picture(fragile, tmp_path):
    _, folder = fragile
    copy = tmp_path / "model"
    copy.mkdir()
    for part in folder.iterdir():
        (copy / part.name).symlink_to(part)
    (copy / "vae").unlink()
    (copy / "vae").mkdir()
    for file in (folder / "vae").glob("*.safetensors"):
        (copy / "vae" / file.name).symlink_to(file)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    pipe = sdjax.Pipeline.from_pretrained(copy, dtype="float16")
    with pytest.raises(NotFiniteError):
        pipe("the cat", steps=2, seed=0, width=16, height=16)
