"""The LoRA that comes with the bundled model: its effect in pixels, and in diffusers."""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch

import sdjax
from sdjax.loading import read_lora
from sdjax.pipeline import BUNDLED_FOLDER
from tests.native import LATENT, SIDE
from tests.parity.reference import channels_first
from training.evaluate import pictures_of
from training.lora_evaluate import measured, scenes_and_prompts

FILE = BUNDLED_FOLDER / "loras" / "outline.safetensors"
PROMPT = "a red circle above a blue square on a white background"


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained(dtype="float32")


def test_it_is_small():
    assert FILE.stat().st_size < 500_000


def test_it_makes_shapes_hollow_and_the_prompt_is_still_followed(pipe):
    scenes, prompts = scenes_and_prompts(24)
    plain, outlined = (measured(pictures_of(pipe, prompts, loras=[(FILE, w)]), scenes) for w in (0.0, 1.0))
    assert plain["hollow"] < 15
    assert outlined["hollow"] > plain["hollow"] + 50
    for statement in ("background", "every color", "relation"):
        assert outlined[statement] > 85


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_diffusers_draws_the_same_picture_with_it(pipe, weight):
    noise = np.random.default_rng(0).normal(size=(1, *LATENT)).astype(np.float32)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(
        BUNDLED_FOLDER, dtype=torch.float32, safety_checker=None
    )
    reference.set_progress_bar_config(disable=True)
    reference.load_lora_weights(str(FILE), adapter_name="outline")
    reference.set_adapters(["outline"], [weight])
    settings = {"guidance_scale": 3.0, "height": SIDE, "width": SIDE}
    latents = channels_first(noise)
    expected = reference(PROMPT, num_inference_steps=20, latents=latents, output_type="np", **settings).images
    settings |= {"steps": 20, "latents": noise, "output": "numpy"}
    drawn = pipe(PROMPT, loras=[(FILE, weight)], **settings).images
    plain = pipe(PROMPT, **settings).images
    assert np.abs(drawn - expected).mean() < 1 / 255
    assert np.abs(drawn - plain).mean() > 4 / 255


def test_without_it_the_model_draws_what_it_drew_before(pipe):
    draw = partial(pipe, PROMPT, seed=3, steps=4, output="numpy")
    before = draw().images
    outlined = draw(loras=[(FILE, 1.0)]).images
    assert np.array_equal(draw(loras=[(FILE, 0.0)]).images, before)
    assert np.array_equal(draw().images, before)
    assert np.array_equal(draw(loras=[(FILE, 0.75), (FILE, 0.25)]).images, outlined)
    assert not np.array_equal(outlined, before)


def test_all_of_the_file_is_used(pipe):
    assert not read_lora(FILE, pipe.params).unused
