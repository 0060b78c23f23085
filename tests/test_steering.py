"""Pictures that start from pictures, with the bundled model."""

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import sdjax
from sdjax.schedulers import SAMPLERS
from tests.native import SIDE
from training.checker import read

PROMPT = "a red circle on a green background"


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def star(pipe):
    return pipe("a large yellow star on a blue background", seed=3).images[0]


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def test_strength_zero_gives_the_picture_back(pipe, noise):
    out = pipe(PROMPT, image=noise, strength=0.0)
    assert np.array_equal(np.asarray(out.images[0]), noise)


def test_strength_one_is_what_the_words_alone_draw(pipe, star):
    alone = pipe(PROMPT, seed=4, output="latents").images
    over = pipe(PROMPT, seed=4, image=star, strength=1.0, output="latents").images
    assert np.array_equal(alone, over)


def test_at_low_strength_layout_stays_and_colour_moves_toward_the_prompt(pipe, star):
    before = np.asarray(star, float)
    out = pipe("a large red star on a blue background", image=star, strength=0.3, num_images=8, seed=0, output="numpy")
    after = out.images.mean(0) * 255
    shape = np.abs(before - before[0, 0]).sum(-1) > 200
    assert np.abs(after - before)[~shape].mean() < 12  # what surrounds the star stays
    red_before, red_after = (np.corrcoef(picture[..., 0][shape], picture[..., 1][shape]) for picture in (before, after))
    assert red_before.shape == red_after.shape
    green = before[..., 1][shape].mean() - after[..., 1][shape].mean()
    assert green > 5  # yellow with less green in it is on its way to red


@pytest.mark.parametrize(
    ("steps", "strength", "said"),
    [
        (4, 0.1, "strength 0.1 of 4 steps leaves no step to run; it must be at least 0.25"),
        (20, 0.04, "at least 0.05"),
        (20, -0.1, "strength must be a number from 0 to 1"),
        (20, 1.0001, "strength must be a number from 0 to 1"),
        (20, float("nan"), "strength must be a finite number"),
    ],
)
def test_a_strength_that_runs_nothing_is_refused(pipe, star, steps, strength, said):
    with pytest.raises(sdjax.RequestError, match=said):
        pipe(PROMPT, image=star, steps=steps, strength=strength)


def test_strength_counts_steps_as_diffusers_does(pipe, star):
    for steps, strength, run in ((100, 0.57, 56), (100, 0.29, 28), (1, 1.0, 1), (10, 0.1, 1)):
        seen = []
        pipe(PROMPT, image=star, steps=steps, strength=strength, progress=lambda *said, seen=seen: seen.append(said))
        assert seen[-1] == (run, run)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_mask_that_keeps_all_keeps_the_latents_too(pipe, star, sampler):
    steps = 5
    kept = np.zeros((SIDE, SIDE), np.uint8)
    out = pipe(PROMPT, image=star, mask=kept, strength=1.0, steps=steps, sampler=sampler, output="latents")
    encoded = sdjax.pipeline.encode(pipe.definition, pipe.params, np.asarray(star, np.float32)[None] / 255)
    np.testing.assert_allclose(out.images, encoded, atol=1e-5)
    picture = pipe(PROMPT, image=star, mask=kept, strength=1.0, steps=steps, sampler=sampler).images[0]
    assert np.array_equal(np.asarray(picture), np.asarray(star))


def test_a_mask_that_repaints_all_is_what_the_words_alone_draw(pipe, star):
    alone = pipe(PROMPT, seed=4).images[0]
    over = pipe(PROMPT, seed=4, image=star, mask=np.full((SIDE, SIDE), 255, np.uint8), strength=1.0).images[0]
    assert np.array_equal(np.asarray(alone), np.asarray(over))


@pytest.mark.parametrize("settings", [{}, {"feather": 3}, {"padding_mask_crop": 4}, {"sampler": "euler_a"}])
def test_what_the_mask_keeps_stays_to_the_byte(pipe, noise, settings):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[5:40, 30:61] = 255
    mask[60, 60] = 255
    out = pipe(PROMPT, image=noise, mask=mask, strength=0.9, num_images=2, steps=6, **settings)
    for picture in out.images:
        moved = np.asarray(picture).astype(int) - noise
        assert not moved[mask == 0].any()
        assert np.abs(moved[10:35, 35:55]).mean() > 10


def test_one_pixel_can_be_repainted(pipe, noise):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[33, 21] = 255
    picture = np.asarray(pipe(PROMPT, image=noise, mask=mask, strength=1.0, steps=4).images[0])
    assert np.argwhere((picture != noise).any(-1)).tolist() == [[33, 21]]


def test_a_red_circle_put_into_a_quarter_is_found_there(pipe):
    tries, found = 64, 0
    rng = np.random.default_rng(5)
    scenes = pipe(["a small white square on the left of a blue background"] * 8, seed=70).images
    half = SIDE // 2
    corners = [(0, 0), (0, half), (half, 0), (half, half)]
    for first in range(0, tries, 8):
        masks, quarters = [], [corners[i] for i in rng.integers(0, 4, 8)]
        for top, left in quarters:
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[top : top + half, left : left + half] = 255
            masks.append(mask)
        out = pipe(
            ["a red circle on a blue background"] * 8, image=scenes, mask=masks, strength=1.0, seed=first,
            padding_mask_crop=0,
        )  # fmt: skip
        for picture, scene, mask, (top, left) in zip(out.images, scenes, masks, quarters, strict=True):
            pixels = np.asarray(picture)
            assert np.array_equal(pixels[mask == 0], np.asarray(scene)[mask == 0])
            region = Image.fromarray(pixels[top : top + half, left : left + half]).resize((SIDE, SIDE))
            found += [(shape.color, shape.likeness) for shape in read(np.asarray(region)).shapes] == [("red", "circle")]
    assert found >= 0.85 * tries, f"{found} of {tries}"


def test_one_picture_a_prompt(pipe, star, noise):
    out = pipe([PROMPT, PROMPT], image=[star, noise], strength=0.0)
    assert [np.array_equal(a, b) for a, b in zip(out.images, (star, noise), strict=True)] == [True, True]
    with pytest.raises(sdjax.RequestError, match="image has 3 pictures for 2 prompts"):
        pipe([PROMPT, PROMPT], image=[star] * 3)
    with pytest.raises(sdjax.RequestError, match="the pictures have 2 sizes"):
        pipe([PROMPT, PROMPT], image=[star, star.resize((32, 32))])
    with pytest.raises(sdjax.RequestError, match="mask needs a picture"):
        pipe(PROMPT, mask=star)


def test_another_strength_mask_or_picture_compiles_nothing(pipe, star, noise, compilations):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[: SIDE // 2] = 255
    pipe(PROMPT, image=star, mask=mask, strength=0.5, steps=4)
    compilations.clear()
    pipe(PROMPT, image=noise, strength=0.9, steps=7, sampler="heun", schedule="karras", guidance_rescale=0.5)
    pipe(PROMPT, image=noise, mask=mask[::-1], strength=0.7, steps=5, feather=2, seed=9)
    pipe(PROMPT, image=noise, mask=mask, strength=0.2, steps=25, sampler="dpmpp_sde")
    pipe(PROMPT, steps=3)
    assert compilations == []


def test_a_walk_can_be_cut_in_two(pipe):
    whole = pipe(PROMPT, seed=2, steps=10, output="latents").images
    half = pipe(PROMPT, seed=2, steps=10, denoising_end=0.6, output="latents").images
    rest = pipe(PROMPT, seed=2, steps=10, denoising_start=0.6, latents=half, output="latents").images
    np.testing.assert_allclose(rest, whole, atol=1e-5)
    assert np.abs(half - whole).max() > 0.1


def test_another_set_of_adapters_or_another_weight_compiles_nothing(pipe, tmp_path, compilations):
    outline = sdjax.pipeline.BUNDLED_FOLDER / "loras" / "outline.safetensors"
    second = tmp_path / "second.safetensors"
    ranks = {"lora_A": 0, "lora_B": 1}  # the axis of the rank, of which the second file has five times as many
    save_file(
        {
            name: np.concatenate([tensor[::-1]] * 5, next(axis for part, axis in ranks.items() if part in name))
            for name, tensor in load_file(outline).items()
        },
        second,
    )
    plain = pipe(PROMPT, seed=1, steps=4, output="latents").images
    pipe(PROMPT, seed=1, steps=4, loras=[(outline, 1.0)], output="latents")
    compilations.clear()
    for loras in ([(outline, 0.5)], [(outline, -1.0)], [(second, 1.0)], [(outline, 0.3), (second, 0.7)]):
        assert not np.array_equal(pipe(PROMPT, seed=1, steps=4, loras=loras, output="latents").images, plain)
    assert np.array_equal(pipe(PROMPT, seed=1, steps=4, output="latents").images, plain)
    assert compilations == []
