"""Weights as int8: how far off they are, what they save, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import sdjax
from sdjax import bench
from sdjax.errors import CheckpointError, RequestError
from sdjax.generation.guidance import stage_denoiser
from sdjax.models import Quantised, is_quantised, quantise
from sdjax.models.quantised import LEAST, dequantised, quantise_weight

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def pipes():
    return sdjax.Pipeline.from_pretrained(), sdjax.Pipeline.from_pretrained(weights="int8")


def nbytes(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_is_off_by_at_most_half_a_level_of_its_channel(dtype):
    kernel = np.random.default_rng(0).standard_normal((16, 8, 3, 3)).astype(np.float32)
    kernel *= np.geomspace(1e-3, 1e3, 16, dtype=np.float32).reshape(16, 1, 1, 1)
    kernel[5] = 0
    stored = quantise_weight(jnp.asarray(kernel, dtype))
    assert (stored.values.dtype, stored.scale.shape, stored.shape) == (np.int8, (16, 1, 1, 1), kernel.shape)
    exact = np.asarray(jnp.asarray(kernel, dtype), np.float32)
    restored = np.asarray(dequantised({"kernel": stored})["kernel"])
    assert restored.dtype == jnp.dtype(dtype)
    level = np.abs(exact).max((1, 2, 3), keepdims=True) / 127
    rounding = {"float32": 1e-6, "bfloat16": 2**-8}[dtype] * np.abs(exact)
    assert (np.abs(restored.astype(np.float32) - exact) <= 0.501 * level + rounding).all()
    assert (restored[5] == 0).all()


def test_only_large_kernels_of_denoiser_and_text_encoders_change(pipes):
    plain, stored = (flatten_dict(pipe.params) for pipe in pipes)
    assert plain.keys() == stored.keys()
    kinds = {path for path, leaf in stored.items() if isinstance(leaf, Quantised)}
    assert {path[0] for path in kinds} == {"unet", "text_encoder"}
    assert {path[-1] for path in kinds} == {"weight"}
    assert not is_quantised(pipes[0].params)
    assert nbytes(pipes[1].params["unet"]) < 0.28 * nbytes(pipes[0].params["unet"])


def test_loading_as_int8_is_loading_and_then_quantising(pipes):
    jax.tree.map(np.testing.assert_array_equal, pipes[1].params, quantise(pipes[0].params))


def test_a_picture_stays_what_it_was(pipes):
    plain, stored = (pipe(PROMPT, seed=3, steps=10, output="numpy").images for pipe in pipes)
    assert np.abs(stored - plain).mean() < 0.02
    assert stored[0, 0, 0, 2] > 0.6 > stored[0, 0, 0, 0]  # blue corners


def test_no_kernel_is_kept_as_floating_point_numbers_through_the_loop(pipes):
    definition, params = pipes[1].definition, pipes[1].params
    configs = [pipes[1].checkpoint.configs["text_encoder"]]
    inputs = bench.random_inputs(definition, configs, size=(64, 64), batch=1, guidance_scale=3.0)
    prepare = stage_denoiser(definition, params, inputs.cond, inputs.latents.shape).prepare
    weights, still = jax.eval_shape(prepare, params, inputs.cond)
    assert all(x.size < LEAST for x in weights)  # nothing that is made of what is stored as int8
    assert still  # while keys and values of the text are
    tokens = inputs.cond.context.shape[2]
    assert any(tokens in x.shape for x in still)


def test_the_loop_makes_kernels_whole_inside_not_before(pipes):
    def barriers(pipe):
        definition, params = pipe.definition, pipe.params
        configs = [pipe.checkpoint.configs["text_encoder"]]
        inputs = bench.random_inputs(definition, configs, size=(64, 64), batch=1, guidance_scale=3.0)
        denoiser = stage_denoiser(definition, params, inputs.cond, inputs.latents.shape)
        prepared = jax.eval_shape(denoiser.prepare, params, inputs.cond)
        one = jnp.zeros(1, jnp.int32)
        program = jax.make_jaxpr(denoiser.predict)(params, inputs.cond, prepared, one, inputs.latents, one * 1.0)
        dtypes = [[v.aval.dtype for v in equation.outvars] for equation in program.jaxpr.eqns if is_barrier(equation)]
        return [tied for tied in dtypes if np.dtype("int8") in tied]

    def is_barrier(equation):
        return equation.primitive.name == "optimization_barrier"

    plain, stored = (barriers(pipe) for pipe in pipes)
    assert not plain
    (tied,) = stored  # the weights to what changes, so that XLA can't move the making of whole kernels out of a loop
    assert np.dtype("float32") in tied


@pytest.mark.parametrize(
    ("action", "error", "said"),
    [
        (lambda pipe, folder: pipe(PROMPT, loras=[(folder, 1.0)]), RequestError, "stored as int8"),
        (lambda pipe, folder: pipe.save_pretrained(folder / "saved"), CheckpointError, "stored as int8"),
        (
            lambda *_: sdjax.Pipeline.from_pretrained(weights="int8", mesh=sdjax.sharding.make_mesh()),
            RequestError,
            "single device",
        ),
        (lambda *_: sdjax.Pipeline.from_pretrained(weights="int4"), RequestError, "'int8' or None, not 'int4'"),
    ],
)
def test_what_needs_the_weights_themselves_is_refused(pipes, tmp_path, action, error, said):
    with pytest.raises(error, match=said):
        action(pipes[1], tmp_path)
    assert not any(tmp_path.iterdir())
