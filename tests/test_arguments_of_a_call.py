"""Seeds in every form, and arguments by the names that other libraries have for them."""

import jax
import numpy as np
import pytest

import sdjax
from sdjax.pipeline import LOADING

PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


def drawn(pipe, prompt, **settings):
    out = pipe(prompt, steps=2, output="latents", **settings)
    return out.seeds, np.asarray(out.images)


def test_a_list_has_a_seed_for_each_prompt(pipe):
    seeds, both = drawn(pipe, PROMPTS, seed=[5, 9])
    assert seeds == (5, 9)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, (5, 9), strict=True)):
        np.testing.assert_array_equal(both[i : i + 1], drawn(pipe, prompt, seed=seed)[1])


@pytest.mark.parametrize(
    ("given", "prompts", "num_images", "seeds"),
    [
        ([5, 9], 2, 1, (5, 9)),
        ([5, 9], 2, 2, (5, 6, 9, 10)),
        ([5, 9, 1, 1], 2, 2, (5, 9, 1, 1)),
        ((7,), 1, 3, (7, 8, 9)),
        ([3, 1, 4], 1, 3, (3, 1, 4)),
        (np.array([5, 9]), 2, 1, (5, 9)),
        (np.uint32([5, 9]), 2, 1, (5, 9)),
        (np.int64(5), 1, 2, (5, 6)),
        (2**64 - 1, 1, 2, (2**64 - 1, 0)),
    ],
)
def test_every_picture_has_the_seed_that_a_list_gives_it(pipe, given, prompts, num_images, seeds):
    assert pipe.resolve(PROMPTS[:prompts], seed=given, num_images=num_images).seeds == seeds


def test_a_jax_key_is_the_seed_that_it_was_made_of(pipe):
    assert pipe.resolve("a", seed=jax.random.key(7), num_images=2).seeds == (7, 8)
    keys = jax.random.split(jax.random.key(7), 2)
    seeds = pipe.resolve(PROMPTS, seed=keys).seeds
    assert seeds == pipe.resolve(PROMPTS, seed=list(keys)).seeds
    high, low = np.asarray(jax.random.key_data(keys[1])).tolist()
    assert seeds[1] == high * 2**32 + low
    np.testing.assert_array_equal(
        drawn(pipe, "a red circle", seed=jax.random.key(7))[1], drawn(pipe, "a red circle", seed=7)[1]
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1, 2, 3], r"seed is a list of 3: give one number, one for each of 2 prompts, or one for each of 4 pictures"),
        ([], "seed is a list of 0"),
        ([1, -2], r"seed\[1\] must be a whole number from 0"),
        ([1, 2.5], r"seed\[1\] must be a whole number"),
        ("12", "seed must be a whole number"),
        (True, "seed must be a whole number"),
        (jax.random.PRNGKey(0), "wrap_key_data"),
        (jax.random.key(0, impl="rbg"), "rbg"),
        (np.ones((2, 2), int), "seed"),
    ],
)
def test_what_is_no_seed_is_refused(pipe, given, said):
    with pytest.raises(sdjax.RequestError, match=said):
        pipe.resolve(PROMPTS, seed=given, num_images=2)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_inference_steps", "steps"),
        ("num_images_per_prompt", "num_images"),
        ("generator", "seed"),
        ("mask_image", "mask"),
        ("output_type", "output"),
        ("callback_on_step_end", "progress"),
        ("guidance_scal", "guidance_scale"),
        ("stepz", "steps"),
    ],
)
def test_an_argument_that_does_not_exist_is_refused_with_the_one_that_was_meant(pipe, name, meant):
    for call in (pipe, pipe.resolve):
        with pytest.raises(TypeError, match=f"a call takes no argument '{name}': did you mean {meant}?"):
            call("a star", **{name: 4})


def test_an_argument_like_no_other_is_refused_with_all_that_there_are(pipe):
    with pytest.raises(TypeError, match="no argument 'zzzzzz': there are steps, guidance_scale, "):
        pipe("a star", zzzzzz=1)


def test_loading_takes_no_other_arguments_either():
    with pytest.raises(TypeError, match="from_pretrained takes no argument 'torch_dtype': did you mean dtype"):
        sdjax.Pipeline.from_pretrained(torch_dtype="float32")
    arguments = sdjax.Pipeline.from_pretrained.__func__.__code__
    assert set(LOADING) == {*arguments.co_varnames[1 : arguments.co_argcount + arguments.co_kwonlyargcount]}


def test_a_pipeline_shows_what_it_is(pipe):
    assert repr(pipe).startswith("Pipeline('tiny', 64x64 pixels, float32, ")
    count = sum(leaf.size for leaf in jax.tree.leaves(pipe.params))
    assert repr(pipe).endswith(f"{count:,} parameters on {jax.devices()[0]})")
