"""diffusers' own Flax models, whose last release is 0.39.0: in an environment of their own, given by `--python`.

They need no Flax model of transformers, which has dropped those, and so there is no text encoder: a picture begins with
an encoded prompt.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

os.environ.setdefault("JAX_LOGGING_LEVEL", "ERROR")

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

try:
    from diffusers import FlaxAutoencoderKL, FlaxDDIMScheduler, FlaxUNet2DConditionModel
except (ImportError, RuntimeError) as error:
    raise ImportError("needs diffusers 0.39.0 or older with flax, in an environment of its own: --python") from error

from benchmarks import random_values
from benchmarks.cases import MATMUL_SIZE, Case, Prepared, Skipped


def prepare(case: Case) -> Prepared:
    """Make a case ready on JAX's default backend."""
    if jax.default_backend() != case.device:
        raise Skipped(f"JAX runs on {jax.default_backend()} there, not on {case.device}")
    if case.what not in CASES:
        raise Skipped("diffusers-flax has no such case")
    run = CASES[case.what](case)
    left, right = (_normal((MATMUL_SIZE, MATMUL_SIZE), i, case) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    return Prepared(lambda: jax.block_until_ready(run()), lambda: jax.block_until_ready(multiply(left, right)))


def _normal(shape: tuple[int, ...], offset: int, case: Case) -> jax.Array:
    return jnp.asarray(random_values.normal(shape, offset), case.arithmetic)


def _model(kind: Any, config: Mapping[str, Any], case: Case) -> tuple[Any, Any]:
    """A model and random parameters."""
    accepted = {key: value for key, value in config.items() if key in kind.__dataclass_fields__}
    accepted = {key: tuple(value) if isinstance(value, list) else value for key, value in accepted.items()}
    model = kind(**accepted, dtype=jnp.dtype(case.arithmetic))
    shapes = jax.eval_shape(model.init_weights, jax.random.key(0))
    leaves = {}
    for offset, (path, leaf) in enumerate(flatten_dict(shapes).items()):
        fan_in = leaf.size // leaf.shape[-1] if path[-1] == "kernel" else leaf.shape[-1]
        value = random_values.weight(leaf.shape, fan_in, offset, is_scale=path[-1] == "scale")
        leaves[path] = jnp.asarray(value, case.arithmetic)
    return model, unflatten_dict(leaves)


def _inputs(case: Case) -> tuple[jax.Array, jax.Array, dict[str, jax.Array] | None]:
    """Latents, channels first as this interface has them, encoded prompts, and what SDXL hears beside them."""
    rows, side, unet = case.sizes.rows * case.batch, case.sizes.latent_size, case.sizes.unet
    context = _normal((rows, case.sizes.tokens, unet["cross_attention_dim"]), 1, case)
    latents = _normal((case.batch, unet["in_channels"], side, side), 2, case)
    added = None
    if unet.get("addition_embed_type"):
        width = list(case.sizes.text_encoders.values())[-1]["projection_dim"]
        size = float(case.sizes.size)
        ids = jnp.tile(jnp.array([size, size, 0, 0, size, size], case.arithmetic), (rows, 1))
        added = {"text_embeds": _normal((rows, width), 3, case), "time_ids": ids}
    return latents, context, added


def _apply_unet(model: Any, params: Any, sample: Any, time: Any, context: Any, added: Any) -> Any:
    return model.apply({"params": params}, sample, time, context, added).sample


def _unet(case: Case) -> Callable[[], Any]:
    model, params = _model(FlaxUNet2DConditionModel, case.sizes.unet, case)
    latents, context, added = _inputs(case)
    rows = context.shape[0]
    sample, times = jnp.tile(latents, (case.sizes.rows, 1, 1, 1)), jnp.full(rows, 801, jnp.int32)
    step = jax.jit(partial(_apply_unet, model))
    return lambda: step(params, sample, times, context, added)


def _apply_decoder(model: Any, params: Any, latents: Any) -> Any:
    return model.apply({"params": params}, latents, method=model.decode).sample


def _vae_decode(case: Case) -> Callable[[], Any]:
    model, params = _model(FlaxAutoencoderKL, case.sizes.vae, case)
    latents, _, _ = _inputs(case)
    decode = jax.jit(partial(_apply_decoder, model))
    return lambda: decode(params, latents)


def _picture(case: Case) -> Callable[[], Any]:
    """The loop of `FlaxStableDiffusionPipeline`, compiled whole."""
    unet, unet_params = _model(FlaxUNet2DConditionModel, case.sizes.unet, case)
    vae, vae_params = _model(FlaxAutoencoderKL, case.sizes.vae, case)
    latents, context, added = _inputs(case)
    scheduler = FlaxDDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    state = scheduler.set_timesteps(scheduler.create_state(), num_inference_steps=case.step_count, shape=latents.shape)

    def draw(params: Any, latents: Any, context: Any, added: Any, state: Any) -> Any:
        def body(i: Any, carried: Any) -> Any:
            latents, state = carried
            time = jnp.asarray(state.timesteps, jnp.int32)[i]
            sample = jnp.concatenate([latents] * case.sizes.rows)
            output = _apply_unet(unet, params[0], sample, jnp.broadcast_to(time, sample.shape[0]), context, added)
            if case.sizes.guided:
                without, with_prompt = jnp.split(output, 2)
                output = without + case.guidance_scale * (with_prompt - without)
            moved, state = scheduler.step(state, output, time, latents).to_tuple()
            return moved.astype(latents.dtype), state

        end, _ = jax.lax.fori_loop(0, case.step_count, body, (latents, state))
        drawn = _apply_decoder(vae, params[1], end / vae.config.scaling_factor)
        return (drawn / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)

    drawing = jax.jit(draw)
    return lambda: drawing((unet_params, vae_params), latents, context, added, state)


CASES: Mapping[str, Callable[[Case], Callable[[], Any]]] = {
    "unet": _unet,
    "vae-decode": _vae_decode,
    "picture": _picture,
}
