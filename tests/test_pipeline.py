"""What the library promises about its functions: purity, one compilation, clear refusals."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

import sdjax
from sdjax.pipeline import stack_tables, start_state
from sdjax.prompts import tokenize
from sdjax.schedulers import table
from tests.native import LATENT, SIDE


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


def conditioning(pipe, prompts, seeds, size=16):
    """One unguided row a prompt, as a caller of the pure functions makes it."""
    ids = [tokenize(tokenizer, prompts) for tokenizer in pipe.checkpoint.tokenizers]
    text = sdjax.pipeline.encode_prompt(pipe.definition, pipe.params, ids)
    keys = jnp.asarray([[0, seed] for seed in seeds], jnp.uint32)
    rows = len(prompts)
    return sdjax.pipeline.Conditioning(
        text.context[None], jnp.ones((1, rows)), keys, jnp.zeros((rows, size, size, 0)), None
    )


def test_params_cannot_be_assigned_into(pipe):
    with pytest.raises((TypeError, ValueError)):
        pipe.params["unet"] = {}
    with pytest.raises((TypeError, ValueError)):
        pipe.params["unet"]["conv_in"]["bias"] = 0
    with pytest.raises(TypeError):
        pipe.params["unet"]["conv_in"]["bias"][0] = 1.0


def test_definitions_of_equal_checkpoints_are_equal(pipe):
    again = sdjax.Pipeline.from_pretrained()
    assert again.definition == pipe.definition
    assert hash(again.definition) == hash(pipe.definition)


def test_hashing_a_definition_does_not_walk_the_networks(pipe):
    # Every call of a compiled function hashes what is static.
    calls = []
    sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code.co_name))
    hash(pipe.definition)
    sys.setprofile(None)
    assert len(calls) < 100


def test_a_new_prompt_seed_sampler_step_count_or_guidance_compiles_nothing(pipe, compilations):
    pipe("a red circle", "blue", seed=1, steps=4, guidance_scale=3.0)
    pipe("a red circle", "blue", seed=1, steps=4, guidance_scale=3.0, progress=lambda *_: None)
    compilations.clear()
    for settings in (
        {"steps": 7},
        {"steps": 30, "sampler": "euler"},
        {"steps": 5, "sampler": "unipc", "schedule": "karras"},
        {"steps": 6, "sampler": "dpmpp_sde"},
        {"steps": 200, "sampler": "ddim"},
        {"steps": 5, "eta": 0.5, "guidance_rescale": 0.7},
        {"steps": 5, "denoising_end": 0.5},
        {"steps": 4, "guidance_scale": 7},
        {"steps": np.int64(4), "guidance_scale": np.float64(7.5)},
        {"steps": 4, "guidance_scale": np.float32(2.5), "seed": 2**63},
    ):
        pipe("a large white star under a black ring", "green, yellow", **{"seed": 2, **settings})
    assert compilations == []


def test_guidance_up_to_one_runs_no_second_half(pipe):
    out = pipe("a red circle", seed=1, steps=2, guidance_scale=1.0, output="latents")
    ours = pipe("a red circle", "anything at all", seed=1, steps=2, guidance_scale=1.0, output="latents")
    assert np.array_equal(out.images, ours.images)


def test_the_pure_functions_can_be_vmapped_over_seeds(pipe):
    schedule = table("euler_a", pipe.checkpoint.scheduler, 4)
    tables = stack_tables([schedule], 4)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(1, *LATENT)), jnp.float32)
    state = start_state(np.float32([schedule.init_noise]), noise)
    cond = conditioning(pipe, ["a red circle"], [0])

    def draw(key):
        seeded = cond._replace(keys=key[None])
        latents = sdjax.pipeline.denoise(pipe.definition, pipe.params, seeded, state, tables, 0, 4)[:, 0]
        return sdjax.pipeline.decode(pipe.definition, pipe.params, latents)

    keys = jnp.asarray([[0, 1], [0, 2], [0, 3]], jnp.uint32)
    together = jax.jit(jax.vmap(draw))(keys)
    apart = jnp.stack([draw(key) for key in keys])
    assert together.shape == (3, 1, SIDE, SIDE, 3)
    np.testing.assert_allclose(together, apart, atol=1e-4)
    assert float(jnp.abs(together[0] - together[1]).mean()) > 1e-3


def test_rows_of_a_batch_may_be_at_different_steps_of_different_samplers(pipe):
    schedules = [table("ddim", pipe.checkpoint.scheduler, 6), table("euler_a", pipe.checkpoint.scheduler, 4)]
    tables = stack_tables(schedules, 8)
    prompts = ["a red circle", "a blue star"]
    cond = conditioning(pipe, prompts, [1, 2])
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, *LATENT)), jnp.float32)
    state = start_state(np.float32([schedule.init_noise for schedule in schedules]), noise)
    run = jax.jit(sdjax.pipeline.denoise, static_argnums=0)
    together = run(pipe.definition, pipe.params, cond, state, tables, jnp.array([0, 0]), jnp.array([2, 0]))
    together = run(pipe.definition, pipe.params, cond, together, tables, jnp.array([2, 0]), jnp.array([6, 4]))
    for row, schedule in enumerate(schedules):
        alone = run(
            pipe.definition,
            pipe.params,
            conditioning(pipe, [prompts[row]], [row + 1]),
            state[row : row + 1],
            stack_tables([schedule], 8),
            0,
            len(schedule.step),
        )
        np.testing.assert_allclose(together[row, 0], alone[0, 0], atol=2e-5)


def test_what_a_long_prompt_loses_is_shown(pipe):
    with pytest.warns(UserWarning, match=r"cut off: '.*yellow ring'"):
        pipe("a red circle " * 12 + "yellow ring", steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a red circle on a blue background", steps=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"width": 65}, "multiple of 4, not 65"),
        ({"height": 0}, "height must be a whole number from 4"),
        ({"width": 4096}, "from 4 to 2048"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, not 0"),
        ({"steps": 1001}, "not 1001"),
        ({"steps": 2.5}, "not 2.5"),
        ({"steps": True}, "not True"),
        ({"sampler": "dimm"}, "sampler must be one of"),
        ({"schedule": "sigmoid"}, "schedule must be one of"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**64}, "seed must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number"),
        ({"num_images": 0}, "num_images must be"),
        ({"output": "jpeg"}, "output must be one of"),
        ({"latents": np.zeros((1, 8, 8, LATENT[-1]))}, "latents must have shape"),
        ({"latents": np.full((1, *LATENT), np.inf)}, "latents hold"),
        ({"negative_prompt": ["a", "b"]}, "2 entries for 1 prompts"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_what_is_allowed(pipe, settings, said):
    with pytest.raises(sdjax.RequestError, match=said):
        pipe("a red circle", **settings)


def test_a_prompt_that_is_no_string_is_named(pipe):
    with pytest.raises(TypeError, match=r"prompt\[1\]"):
        pipe(["a", None])
    with pytest.raises(TypeError, match="prompt must be a string"):
        pipe(5)


def test_not_a_number_is_an_error_and_not_a_black_picture(pipe):
    from dataclasses import replace

    flat = {**pipe.params["unet"]["conv_out"], "bias": pipe.params["unet"]["conv_out"]["bias"].at[0].set(jnp.nan)}
    broken = FrozenDict({**pipe.params, "unet": FrozenDict({**pipe.params["unet"], "conv_out": FrozenDict(flat)})})
    sick = sdjax.Pipeline(replace(pipe.checkpoint, params=broken), name="sick")
    with pytest.raises(sdjax.NotFiniteError, match="seed 3"):
        sick("a red circle", seed=3, steps=2)


@pytest.mark.parametrize(
    "environment",
    [{"JAX_DEFAULT_PRNG_IMPL": "rbg"}, {"JAX_THREEFRY_PARTITIONABLE": "0"}, {"JAX_ENABLE_X64": "1"}],
    ids=lambda environment: next(iter(environment)),
)
def test_global_settings_do_not_change_a_picture(pipe, environment, tmp_path):
    code = (
        "import sdjax, numpy, sys; pipe = sdjax.Pipeline.from_pretrained();"
        "out = pipe('a red circle', seed=1, steps=3, sampler='euler_a', output='latents');"
        "numpy.save(sys.argv[1], out.images)"
    )
    file = tmp_path / "latents.npy"
    subprocess.run([sys.executable, "-c", code, file], env={**os.environ, **environment}, check=True)
    here = pipe("a red circle", seed=1, steps=3, sampler="euler_a", output="latents").images
    np.testing.assert_allclose(np.load(file), here, atol=1e-5)


def test_the_noise_of_a_seed_is_the_same_for_ever():
    noise = sdjax.generation.draw_noise(np.array([[0, 1]], np.uint32), 3, (8,))[0]
    np.testing.assert_allclose(noise, STORED_NOISE, atol=1e-6)


STORED_NOISE = [-1.0126554, -0.6990573, -0.6017126, -1.886876, -0.7762225, -1.3365691, 0.6347491, -0.1552271]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_nearly_the_same_picture(pipe, dtype):
    full = pipe("a red circle on a blue background", seed=1, output="numpy").images
    half = sdjax.Pipeline.from_pretrained(dtype=dtype)(
        "a red circle on a blue background", seed=1, output="numpy"
    ).images
    assert np.abs(full - half).mean() < 0.05
