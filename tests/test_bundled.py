"""The bundled model, from words to pixels."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sdjax
from sdjax.pipeline import BUNDLED_FOLDER, stack_tables, start_state
from sdjax.prompts import tokenize
from sdjax.schedulers import SAMPLERS, table
from tests.native import LATENT, SIDE
from training.checker import check, read
from training.drawings import draw
from training.evaluate import pictures_of, scenes_and_prompts, shares

RED_ON_BLUE = "a red circle on a blue background"


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def reference():
    made = diffusers.StableDiffusionPipeline.from_pretrained(BUNDLED_FOLDER, dtype=torch.float32, safety_checker=None)
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe, *args, **settings):
    return [np.asarray(image) for image in pipe(*args, **settings).images]


def test_the_prompt_decides_what_is_drawn(pipe):
    for picture in drawn(pipe, RED_ON_BLUE, seed=7, num_images=4):
        reading = read(picture)
        assert reading.background == "blue"
        assert [(shape.likeness, shape.color) for shape in reading.shapes] == [("circle", "red")]


def test_held_out_prompts_are_drawn_as_said(pipe):
    scenes, prompts = scenes_and_prompts(64)
    percent = shares(pictures_of(pipe, prompts), scenes)
    assert percent["every color"] >= 90
    assert percent["every kind"] >= 50  # by the strict checker
    assert percent["relation"] >= 70


def test_shuffled_prompts_score_at_chance(pipe):
    scenes, prompts = scenes_and_prompts(64)
    percent = shares(pictures_of(pipe, prompts), scenes[1:] + scenes[:1])
    assert percent["every color"] < 10
    assert percent["every kind"] < 15


def test_a_negative_prompt_moves_the_picture_away_from_it(pipe):
    plain = drawn(pipe, "a circle", seed=3, num_images=16)
    moved = drawn(pipe, "a circle", "a blue background, a red circle", seed=3, num_images=16)
    assert any((a != b).any() for a, b in zip(plain, moved, strict=True))
    blues = [sum(read(picture).background == "blue" for picture in pictures) for pictures in (plain, moved)]
    assert blues[1] <= blues[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_is_said(pipe, sampler):
    found = [read(picture) for picture in drawn(pipe, RED_ON_BLUE, seed=0, num_images=8, sampler=sampler)]
    right = [reading.background == "blue" and [shape.color for shape in reading.shapes] == ["red"] for reading in found]
    assert sum(right) >= 7


def test_two_seeds_differ_and_one_seed_repeats(pipe):
    first, again, other = (drawn(pipe, RED_ON_BLUE, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_each_image_of_a_batch_can_be_drawn_alone_from_its_seed(pipe):
    out = pipe(["a green star", "a white ring on a black background"], seed=2**64 - 2, num_images=2)
    assert out.seeds == (2**64 - 2, 2**64 - 1, 0, 1)
    prompts = ["a green star"] * 2 + ["a white ring on a black background"] * 2
    for image, seed, prompt in zip(out.images, out.seeds, prompts, strict=True):
        assert np.array_equal(np.asarray(image), drawn(pipe, prompt, seed=seed)[0])


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "ddpm", "dpmpp_sde", "dpmpp_2m_sde", "lcm"])
def test_a_picture_does_not_depend_on_how_the_loop_is_sliced(pipe, sampler):
    whole = drawn(pipe, RED_ON_BLUE, seed=5, steps=8, sampler=sampler)[0]
    reports = []
    sliced = drawn(
        pipe, RED_ON_BLUE, seed=5, steps=8, sampler=sampler, progress=lambda done, total: reports.append((done, total))
    )[0]
    assert np.array_equal(whole, sliced)
    assert reports[0] == (0, 8)
    assert reports[-1] == (8, 8)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_diffusers_draws_the_same_picture(pipe, reference, guidance_scale):
    noise = np.random.default_rng(0).normal(size=(2, *LATENT)).astype(np.float32)
    prompts = ["a purple star above a white square on a black background", RED_ON_BLUE]
    settings = {"guidance_scale": guidance_scale}
    expected = reference(
        prompts,
        num_inference_steps=20,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
        height=SIDE,
        width=SIDE,
        **settings,
    ).images
    ours = pipe(prompts, steps=20, latents=noise, output="numpy", **settings).images
    assert np.abs(ours - expected).mean() < 1 / 255


def test_a_pixel_loss_has_the_gradient_that_pytorch_finds(pipe, reference):
    prompt, steps = "a red circle", 4
    noise = np.random.default_rng(0).normal(size=(1, *LATENT)).astype(np.float32)

    schedule = table("ddim", pipe.checkpoint.scheduler, steps)
    ids = [tokenize(tokenizer, [prompt]) for tokenizer in pipe.checkpoint.tokenizers]
    text = sdjax.pipeline.encode_prompt(pipe.definition, pipe.params, ids)
    keys, extra = jnp.zeros((1, 2), jnp.uint32), jnp.zeros((1, *LATENT[:2], 0))
    cond = sdjax.pipeline.Conditioning(text.context[None], jnp.ones((1, 1)), keys, extra, None)

    def loss(latents):
        state = start_state(np.float32([schedule.init_noise]), latents)
        tables = stack_tables([schedule], steps)
        # bounds that are Python integers make a loop of known length, which differentiates in reverse
        final = sdjax.pipeline.denoise(pipe.definition, pipe.params, cond, state, tables, 0, steps)[:, 0]
        return jnp.square(sdjax.pipeline.decode(pipe.definition, pipe.params, final) - 0.25).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(noise)

    start = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()).requires_grad_()
    context = reference.encode_prompt(prompt, "cpu", 1, False)[0]
    reference.scheduler.set_timesteps(steps)
    latents = start
    for t in reference.scheduler.timesteps:
        latents = reference.scheduler.step(reference.unet(latents, t, context).sample, t, latents).prev_sample
    pixels = reference.vae.decode(latents / reference.vae.config.scaling_factor).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) - 0.25).square().mean()
    expected.backward()

    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    theirs = start.grad.numpy().transpose(0, 2, 3, 1)
    assert np.linalg.norm(gradient - theirs) < 1e-2 * np.linalg.norm(theirs)


def test_the_checker_agrees_with_the_true_drawings():
    scenes, _ = scenes_and_prompts(256)
    verdicts = [check(draw(scene, SIDE), scene) for scene in scenes]
    assert np.mean([verdict.everything for verdict in verdicts]) >= 0.99
