"""Pictures to start from, against diffusers' pipelines: the same noise, the same latents to 1e-4."""

import diffusers
import numpy as np
import pytest
import torch
from reference import channels_first, channels_last, pipeline

import sdjax

TOLERANCE = 1e-4
PROMPT, NEGATIVE = "the cat sat on the mat", "a"
RNG = np.random.default_rng(6)
PICTURE = RNG.integers(0, 256, (64, 64, 3), np.uint8)
NOISE = RNG.normal(size=(1, 8, 8, 4)).astype(np.float32)
MASK = np.zeros((64, 64), np.uint8)
MASK[16:48, 8:56] = 255

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A function that makes an architecture once, for both sides."""
    made = {}

    def both(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = pipeline(name, folder), sdjax.Pipeline.from_pretrained(folder / "model")
        return made[name]

    return both


def mean_latents(reference, pixels):
    """diffusers' latents of a picture, without the posterior's noise."""
    with torch.no_grad():
        mean = reference.vae.encode(channels_first(pixels[None].astype(np.float32) / 127.5 - 1)).latent_dist.mean
    return mean * reference.vae.config.scaling_factor


def as_saved(config):
    """A config as its file holds it: `from_config` leaves out what it remembers as another class's default."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def drawn_by(kind, reference, scheduler, monkeypatch, **settings):
    """Run one of diffusers' pipelines on a reference's parts, with our noise as its noise."""
    parts = {name: part for name, part in reference.components.items() if name != "image_encoder"}
    parts["scheduler"] = SCHEDULERS[scheduler].from_config(as_saved(reference.scheduler.config))
    made = kind(**parts, **({} if "text_encoder_2" in parts else {"requires_safety_checker": False}))
    made.set_progress_bar_config(disable=True)
    module = __import__(kind.__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: channels_first(NOISE))
    out = made(PROMPT, negative_prompt=NEGATIVE, guidance_scale=5.0, output_type="latent", **settings)
    return channels_last(out.images)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_image_to_image_agrees(make, monkeypatch, sampler, strength):
    reference, pipe = make("sd-v1-5")
    expected = drawn_by(
        diffusers.StableDiffusionImg2ImgPipeline,
        reference,
        sampler,
        monkeypatch,
        image=mean_latents(reference, PICTURE),
        strength=strength,
        num_inference_steps=10,
    )
    out = pipe(
        PROMPT, NEGATIVE, image=PICTURE, strength=strength, steps=10, guidance_scale=5.0, sampler=sampler,
        latents=NOISE, output="latents",
    )  # fmt: skip
    np.testing.assert_allclose(out.images, expected, atol=TOLERANCE, rtol=0)


def test_image_to_image_of_sdxl_agrees(make, monkeypatch):
    reference, pipe = make("sd-xl")
    expected = drawn_by(
        diffusers.StableDiffusionXLImg2ImgPipeline,
        reference,
        "ddim",
        monkeypatch,
        image=mean_latents(reference, PICTURE),
        strength=0.5,
        num_inference_steps=10,
    )
    out = pipe(
        PROMPT, NEGATIVE, image=PICTURE, strength=0.5, steps=10, guidance_scale=5.0, latents=NOISE, output="latents"
    )
    np.testing.assert_allclose(out.images, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["sd-v1-5", "sd-v1-5-inpaint", "sd-v2-inpaint", "sd-xl-inpaint"])
@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 1.0), ("ddim", 0.6), ("euler", 1.0)])
def test_inpainting_agrees(make, monkeypatch, name, sampler, strength):
    """Both kinds of checkpoint: those that see the mask, and ordinary ones whose known latents are blended in."""
    reference, pipe = make(name)
    kind = diffusers.StableDiffusionXLInpaintPipeline if "xl" in name else diffusers.StableDiffusionInpaintPipeline
    masked = np.where(MASK[..., None] > 127, 127.5, PICTURE.astype(np.float64))
    with torch.no_grad():
        seen = reference.vae.encode(channels_first(masked[None].astype(np.float32) / 127.5 - 1)).latent_dist.mean
    expected = drawn_by(
        kind,
        reference,
        sampler,
        monkeypatch,
        image=mean_latents(reference, PICTURE),
        mask_image=torch.from_numpy(MASK[None, None].astype(np.float32) / 255),
        masked_image_latents=seen * reference.vae.config.scaling_factor,
        height=64,
        width=64,
        strength=strength,
        num_inference_steps=10,
    )
    out = pipe(
        PROMPT, NEGATIVE, image=PICTURE, mask=MASK, strength=strength, steps=10, guidance_scale=5.0, sampler=sampler,
        latents=NOISE, output="latents",
    )  # fmt: skip
    np.testing.assert_allclose(out.images, expected, atol=TOLERANCE, rtol=0)


def test_guidance_rescale_agrees(make):
    reference, pipe = make("sd-v2-1")
    settings = {"guidance_scale": 9.0, "guidance_rescale": 0.7, "height": 64, "width": 64}
    expected = reference(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=6, latents=channels_first(NOISE), output_type="latent",
        **settings,
    ).images  # fmt: skip
    out = pipe(PROMPT, NEGATIVE, steps=6, latents=NOISE, output="latents", **settings)
    np.testing.assert_allclose(out.images, channels_last(expected), atol=TOLERANCE, rtol=0)


def test_a_unet_that_was_distilled_for_guidance_hears_the_scale(make, tmp_path):
    reference, _ = make("sd-v1-5")
    torch.manual_seed(1)
    config = {**as_saved(reference.unet.config), "time_cond_proj_dim": 32}
    parts = {name: part for name, part in reference.components.items() if name != "image_encoder"}
    parts["unet"] = diffusers.UNet2DConditionModel.from_config(config).eval()
    parts["scheduler"] = diffusers.LCMScheduler.from_config(as_saved(reference.scheduler.config))
    distilled = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    distilled.set_progress_bar_config(disable=True)
    distilled.save_pretrained(tmp_path)
    pipe = sdjax.Pipeline.from_pretrained(tmp_path)
    made = {}
    for scale in (1.0, 8.0):
        expected = distilled(
            PROMPT, num_inference_steps=1, guidance_scale=scale, latents=channels_first(NOISE), output_type="latent",
            height=64, width=64,
        ).images  # fmt: skip
        settings = {"steps": 1, "guidance_scale": scale, "latents": NOISE, "output": "latents"}
        made[scale] = pipe(PROMPT, **settings).images
        size = np.abs(channels_last(expected)).max()  # one step from pure noise divides by a signal of 0.07
        np.testing.assert_allclose(made[scale] / size, channels_last(expected) / size, atol=TOLERANCE, rtol=0)
        assert np.array_equal(made[scale], pipe(PROMPT, "anything else", **settings).images)
    assert np.abs(made[1.0] - made[8.0]).max() > 1e-3
