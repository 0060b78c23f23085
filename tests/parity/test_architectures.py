"""Every architecture against PyTorch: the same weights, the same input, the same numbers to 1e-4."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from reference import ARCHITECTURES, TEXT_TO_IMAGE, channels_first, channels_last, pipeline

import sdjax
from sdjax.loading.weights import tensor_name
from sdjax.models import AddedConditioning, UNet, UNetConfig, bind, define
from sdjax.prompts import tokenize

TOLERANCE = 1e-4
PROMPTS = ["the cat sat on the mat", "A cat, 42!"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = pipeline(request.param, folder)
    return reference, sdjax.Pipeline.from_pretrained(folder / "model")


def text_of(reference, prompts):
    """diffusers' text embeddings, and the pooled ones of an SDXL checkpoint."""
    with torch.no_grad():
        if hasattr(reference, "text_encoder_2"):
            context, _, pooled, _ = reference.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")
            return context, pooled
        return reference.encode_prompt(prompts, "cpu", 1, False)[0], None


def test_text_embeddings_agree(both):
    reference, pipe = both
    context, pooled = text_of(reference, PROMPTS)
    ids = [tokenize(tokenizer, PROMPTS) for tokenizer in pipe.checkpoint.tokenizers]
    text = sdjax.pipeline.encode_prompt(pipe.definition, pipe.params, ids)
    np.testing.assert_allclose(text.context, context.numpy(), atol=TOLERANCE, rtol=0)
    assert (pooled is None) == (text.pooled is None)
    if pooled is not None:
        np.testing.assert_allclose(text.pooled, pooled.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_one_unet_call_agrees(both, size):
    reference, pipe = both
    rng = np.random.default_rng(1)
    sample = rng.normal(size=(2, *size, pipe.definition.denoiser_config.in_channels)).astype(np.float32)
    timesteps = np.array([7.0, 981.5], np.float32)
    context, pooled = text_of(reference, PROMPTS)
    ids = rng.integers(0, 100, (2, 6)).astype(np.float32)
    with torch.no_grad():
        expected = reference.unet(
            channels_first(sample),
            torch.from_numpy(timesteps),
            context,
            added_cond_kwargs=None if pooled is None else {"text_embeds": pooled, "time_ids": torch.from_numpy(ids)},
        ).sample
    added = None if pooled is None else AddedConditioning(pooled.numpy(), ids)
    output = bind(pipe.definition.denoiser, pipe.params["unet"])(sample, timesteps, context.numpy(), added)
    np.testing.assert_allclose(output, channels_last(expected), atol=TOLERANCE, rtol=0)


def test_autoencoder_agrees_both_ways(both):
    reference, pipe = both
    pictures = np.random.default_rng(2).uniform(-1, 1, (2, 24, 40, 3)).astype(np.float32)
    with torch.no_grad():
        seen = reference.vae.encode(channels_first(pictures)).latent_dist
        redrawn = reference.vae.decode(seen.mean).sample
    vae = bind(pipe.definition.vae, pipe.params["vae"])
    moments = vae.encode(pictures)
    np.testing.assert_allclose(moments.mean, channels_last(seen.mean), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(moments.log_variance, channels_last(seen.logvar), atol=TOLERANCE, rtol=0)
    scaled = channels_last(seen.mean) * pipe.definition.vae_config.scaling_factor
    drawn = sdjax.pipeline.decode(pipe.definition, pipe.params, scaled)
    expected = np.clip(channels_last(redrawn) / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(drawn, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module", params=TEXT_TO_IMAGE)
def text_to_image(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = pipeline(request.param, folder)
    return reference, sdjax.Pipeline.from_pretrained(folder / "model")


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_whole_ddim_trajectory_agrees(text_to_image, guidance_scale):
    reference, pipe = text_to_image
    reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config, clip_sample=False)
    noise = np.random.default_rng(3).normal(size=(2, 8, 8, 4)).astype(np.float32)
    arguments = {"guidance_scale": guidance_scale, "height": 64, "width": 64}
    expected = reference(
        PROMPTS,
        negative_prompt=["the", "a"],
        num_inference_steps=10,
        latents=channels_first(noise),
        output_type="latent",
        **arguments,
    ).images
    out = pipe(PROMPTS, ["the", "a"], steps=10, sampler="ddim", latents=noise, output="latents", **arguments)
    np.testing.assert_allclose(out.images, channels_last(expected), atol=TOLERANCE, rtol=0)


def test_no_negative_prompt_means_what_diffusers_takes_it_for(text_to_image):
    reference, pipe = text_to_image
    reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config, clip_sample=False)
    noise = np.random.default_rng(4).normal(size=(1, 8, 8, 4)).astype(np.float32)
    expected = reference(
        PROMPTS[0], num_inference_steps=4, guidance_scale=5.0, latents=channels_first(noise), output_type="latent"
    ).images
    out = pipe(PROMPTS[0], steps=4, sampler="ddim", guidance_scale=5.0, latents=noise, output="latents")
    np.testing.assert_allclose(out.images, channels_last(expected), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_full_size_sd15_unet_call_agrees():
    import diffusers

    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).eval()
    config = UNetConfig.from_dict(reference.config)
    definition, shapes = define(UNet, config, dtype="float32", param_dtype="float32")
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    leaves = {path: tensors[tensor_name(path)] for path in flatten_dict(shapes)}
    params = FrozenDict(unflatten_dict(leaves))
    rng = np.random.default_rng(5)
    sample = rng.normal(size=(1, 64, 64, 4)).astype(np.float32)
    context = rng.normal(size=(1, 77, 768)).astype(np.float32)
    with torch.no_grad():
        expected = reference(channels_first(sample), torch.tensor([501.0]), torch.from_numpy(context)).sample
    call = jax.jit(lambda params, *inputs: bind(definition, params)(*inputs))
    output = call(params, sample, np.array([501.0], np.float32), context)
    np.testing.assert_allclose(output, channels_last(expected), atol=TOLERANCE, rtol=0)
