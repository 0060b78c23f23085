"""SDXL's base and its refiner, one walk in two models, against diffusers."""

import diffusers
import numpy as np
import pytest
import torch
from reference import BETAS, DDIM, TEXT_WIDTH, XL_UNET, channels_first, channels_last, pipeline

import sdjax

TOLERANCE = 1e-4
PROMPT, NEGATIVE = "the cat sat on the mat", "a"
NOISE = np.random.default_rng(8).normal(size=(1, 8, 8, 4)).astype(np.float32)
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(**DDIM),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
}
COMMON = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return pipeline("sd-xl", folder), sdjax.Pipeline.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def refiner(base, tmp_path_factory):
    """A refiner has the second text encoder alone, and an aesthetic score where the base has a target size."""
    torch.manual_seed(1)
    changed = {
        "cross_attention_dim": TEXT_WIDTH,
        "projection_class_embeddings_input_dim": XL_UNET["projection_class_embeddings_input_dim"] - 8,
    }
    made = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base[0].vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base[0].text_encoder_2,
        tokenizer_2=base[0].tokenizer_2,
        unet=diffusers.UNet2DConditionModel(**{**XL_UNET, **changed}).eval(),
        scheduler=diffusers.DDIMScheduler(**DDIM),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("refiner")
    made.save_pretrained(folder)
    return made, sdjax.Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_refiner_goes_on_where_the_base_left_off(base, refiner, sampler, share):
    for reference, _ in (base, refiner):
        reference.scheduler = SCHEDULERS[sampler]()
    (first, ours), (second, our_second) = base, refiner
    begun = {"latents": channels_first(NOISE), "denoising_end": share, "height": 64, "width": 64}
    half = first(PROMPT, negative_prompt=NEGATIVE, **begun, **COMMON).images
    expected = second(PROMPT, negative_prompt=NEGATIVE, image=half, denoising_start=share, **COMMON).images
    settings = {"steps": 10, "guidance_scale": 5.0, "sampler": sampler, "output": "latents", "width": 64, "height": 64}
    left = ours(PROMPT, NEGATIVE, latents=NOISE, denoising_end=share, **settings).images
    np.testing.assert_allclose(left, channels_last(half), atol=TOLERANCE, rtol=0)
    out = our_second(PROMPT, NEGATIVE, latents=left, denoising_start=share, **settings).images
    np.testing.assert_allclose(out, channels_last(expected), atol=TOLERANCE, rtol=0)
    assert np.abs(out - np.asarray(left)).max() > 0.1


def test_a_score_of_looks_steers_the_refiner_as_in_diffusers(refiner):
    reference, pipe = refiner
    reference.scheduler = diffusers.DDIMScheduler(**DDIM)
    scores = {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}
    drawn = {}
    for given in ({}, scores):
        expected = reference(
            PROMPT, negative_prompt=NEGATIVE, image=channels_first(NOISE), denoising_start=0.5, **COMMON, **given
        ).images
        drawn[len(given)] = pipe(
            PROMPT, NEGATIVE, latents=NOISE, denoising_start=0.5, steps=10, guidance_scale=5.0, sampler="ddim",
            width=64, height=64, output="latents", **given,
        ).images  # fmt: skip
        np.testing.assert_allclose(drawn[len(given)], channels_last(expected), atol=TOLERANCE, rtol=0)
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3


def test_sizes_and_crops_steer_the_base_as_in_diffusers(base):
    reference, pipe = base
    reference.scheduler = diffusers.DDIMScheduler(**DDIM)
    expected = reference(
        PROMPT, negative_prompt=NEGATIVE, latents=channels_first(NOISE), height=64, width=64,
        original_size=(96, 128), crops_coords_top_left=(4, 12), target_size=(80, 72), **COMMON,
    ).images  # fmt: skip
    settings = {"steps": 10, "guidance_scale": 5.0, "sampler": "ddim", "width": 64, "height": 64, "output": "latents"}
    sized = {"original_size": (96, 128), "crop": (4, 12), "target_size": (80, 72)}
    drawn = pipe(PROMPT, NEGATIVE, latents=NOISE, **settings, **sized).images
    np.testing.assert_allclose(drawn, channels_last(expected), atol=TOLERANCE, rtol=0)
    assert np.abs(drawn - pipe(PROMPT, NEGATIVE, latents=NOISE, **settings).images).max() > 1e-3
