"""sdjax itself, through its pure functions."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

import sdjax
from benchmarks import random_values
from benchmarks.cases import MATMUL_SIZE, Case, Prepared, Skipped
from sdjax.batch import Conditioning, seed_keys, stack_tables, start_state
from sdjax.generation import Tokens, decode, denoise, encode_prompt
from sdjax.guidance import stage_denoiser
from sdjax.models import (
    VAE,
    AddedConditioning,
    CLIPText,
    CLIPTextConfig,
    Definition,
    UNet,
    UNetConfig,
    VAEConfig,
    attention,
    bind,
    convolution,
    define,
)

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def prepare(case: Case) -> Prepared:
    """Make a case ready on JAX's default backend."""
    if jax.default_backend() != case.device:
        raise Skipped(f"JAX runs on {jax.default_backend()} here, not on {case.device}")
    if case.what not in CASES:
        raise Skipped("sdjax has no such case")
    return CASES[case.what](case)


def _ready(
    case: Case,
    function: Callable[..., Any],
    *arguments: Any,
    plain: Callable[[Any], Any],
    notes: Mapping[str, float] | None = None,
) -> Prepared:
    """Compile a function of arrays.

    Args:
        case: what is timed.
        function: does it.
        arguments: its arguments.
        plain: the same work without loops over rows, of the first argument, for counting.
        notes: what else to report.
    """
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    notes = {"compile_seconds": time.perf_counter() - began, **(notes or {})}
    return Prepared(
        lambda: jax.block_until_ready(compiled(*arguments)), _matmul(case), _flops(plain, arguments[0]), notes
    )


def _flops(plain: Callable[[Any], Any], params: Any) -> float | None:
    """Operations by XLA's analysis of the plain formulation: what Winograd's forms save is speed, not less work done.

    The analysis counts the body of a loop once, so attention in blocks would be missing too.
    """
    chosen, short = convolution.choose, attention.SHORT
    convolution.choose, attention.SHORT = (lambda *_, **__: convolution.Form.DIRECT), 2**62
    try:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        analysis = jax.jit(lambda params: plain(params)).lower(shapes).cost_analysis()
    finally:
        convolution.choose, attention.SHORT = chosen, short
    return None if not analysis else float(analysis["flops"])


def build(case: Case, *parts: str) -> tuple[Definition, Any]:
    """A definition and random parameters of the named parts ("unet", "vae", "text"), the others without weights."""
    sizes, dtype = case.sizes, case.dtype
    models: dict[str, tuple[Any, Any]] = {
        "unet": (UNet, UNetConfig.from_dict(sizes.unet)),
        "vae": (VAE, VAEConfig.from_dict(sizes.vae)),
        **{name: (CLIPText, CLIPTextConfig.from_dict(config)) for name, config in sizes.text_encoders.items()},
    }
    definitions, params = {}, {}
    for name, (model, config) in models.items():
        definitions[name], shapes = define(model, config, dtype=dtype, param_dtype=dtype)
        if name in parts or (name in sizes.text_encoders and "text" in parts):
            params[name] = _filled(shapes)
    definition = Definition(
        unet=definitions["unet"],
        vae=definitions["vae"],
        text_encoders=tuple((name, definitions[name]) for name in sizes.text_encoders),
        unet_config=models["unet"][1],
        vae_config=models["vae"][1],
        dtype=dtype,
    )
    return definition, FrozenDict(params)


def _filled(shapes: Any) -> Any:
    leaves = {}
    for offset, (path, leaf) in enumerate(flatten_dict(shapes).items()):
        fan_in = int(np.prod(leaf.shape[:-1])) if path[-1] == "kernel" else leaf.shape[-1]
        value = random_values.weight(leaf.shape, fan_in, offset, is_scale=path[-1] == "scale")
        leaves[path] = jax.block_until_ready(jnp.array(value, leaf.dtype))
    return unflatten_dict(leaves)


def _text_encoder(case: Case) -> Prepared:
    definition, params = build(case, "text")
    tokens = _tokens(case)

    def plain(params: Any) -> Any:
        encoders = zip(definition.text_encoders, tokens, strict=True)
        return [bind(encoder, params[name])(x.ids.reshape(-1, x.ids.shape[-1])) for (name, encoder), x in encoders]

    return _ready(case, partial(encode_prompt, definition), params, tokens, plain=plain)


def _tokens(case: Case) -> list[Tokens]:
    rows, shape = case.sizes.rows * case.batch, (case.sizes.rows, case.batch, 1, -1)
    ids = [
        random_values.token_ids(rows, config["max_position_embeddings"], config["eos_token_id"]).reshape(shape)
        for config in case.sizes.text_encoders.values()
    ]
    return [Tokens(x, np.ones(x.shape, np.float32)) for x in ids]


def _conditioning(case: Case, definition: Definition) -> Conditioning:
    sizes, batch = case.sizes, case.batch
    shape = (sizes.rows, batch)
    width = definition.unet_config.context_channels
    weights = np.array([[-6.5], [7.5]] if sizes.guided else [[1.0]], np.float32).repeat(batch, axis=1)
    added = None
    if definition.is_xl:
        pooled = list(sizes.text_encoders.values())[-1]["projection_dim"]
        ids = np.array([sizes.size, sizes.size, 0, 0, sizes.size, sizes.size], np.float32)
        added = AddedConditioning(
            jnp.asarray(random_values.normal((*shape, pooled), 3)), jnp.asarray(np.broadcast_to(ids, (*shape, 6)))
        )
    return Conditioning(
        context=jnp.asarray(random_values.normal((*shape, 77, width), 1), case.dtype),
        weights=jnp.asarray(weights),
        keys=jnp.asarray(seed_keys(range(batch))),
        extra=jnp.zeros((batch, sizes.latent_size, sizes.latent_size, 0), jnp.float32),
        added=added,
    )


def _latents(case: Case, definition: Definition) -> Any:
    channels = definition.vae_config.latent_channels
    return random_values.normal((case.batch, case.sizes.latent_size, case.sizes.latent_size, channels), 2)


def _table(case: Case, steps: int) -> Any:
    schedule = sdjax.schedulers.table("ddim", sdjax.schedulers.SchedulerConfig.from_dict(SCHEDULER), steps)
    return stack_tables([schedule] * case.batch, len(schedule.timesteps))


def _unet(case: Case) -> Prepared:
    definition, params = build(case, "unet")
    cond = _conditioning(case, definition)
    latents, timesteps = jnp.asarray(_latents(case, definition)), jnp.full(case.batch, 801.0)
    staged = stage_denoiser(definition, params, cond, latents.shape)
    prepare = jax.jit(staged.prepare).lower(params, cond).compile()
    began = time.perf_counter()
    prepared = jax.block_until_ready(prepare(params, cond))
    notes = {"once_a_picture_seconds": time.perf_counter() - began}
    index = jnp.zeros(case.batch, jnp.int32)

    def plain(params: Any) -> Any:
        rows = case.sizes.rows * case.batch
        sample, times = (jnp.broadcast_to(x[:1], (rows, *x.shape[1:])) for x in (latents, timesteps))
        context, added = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), (cond.context, cond.added))
        return bind(definition.unet, params["unet"])(sample, times, context, added)

    return _ready(case, staged.predict, params, cond, prepared, index, latents, timesteps, plain=plain, notes=notes)


def _vae_decode(case: Case) -> Prepared:
    definition, params = build(case, "vae")
    latents = _latents(case, definition)

    def plain(params: Any) -> Any:
        return bind(definition.vae, params["vae"]).decode(latents)

    return _ready(case, partial(decode, definition), params, latents, plain=plain)


def _picture(case: Case) -> Prepared:
    definition, params = build(case, "unet", "vae", "text")
    cond, table = _conditioning(case, definition), jax.device_put(_table(case, case.step_count))
    rows = table.timesteps.shape[1]
    encoding = jax.jit(partial(encode_prompt, definition))
    denoising = jax.jit(partial(denoise, definition), donate_argnums=2)
    decoding = jax.jit(partial(decode, definition))
    tokens, noise = _tokens(case), _latents(case, definition)

    def run() -> Any:
        text = encoding(params, tokens)
        steered = cond._replace(context=text.context)
        if text.pooled is not None:
            steered = steered._replace(added=cond.added._replace(text_embeds=text.pooled))
        state = start_state(np.ones(case.batch, np.float32), noise)
        state = denoising(params, steered, state, table, np.int32(0), np.int32(rows))
        return jax.block_until_ready(decoding(params, state[:, 0]))

    return Prepared(run, _matmul(case), None, {})


def _matmul(case: Case) -> Callable[[], object]:
    left, right = (jnp.asarray(random_values.normal((MATMUL_SIZE, MATMUL_SIZE), i), case.dtype) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(multiply(left, right))


CASES: Mapping[str, Callable[[Case], Prepared]] = {
    "text-encoder": _text_encoder,
    "unet": _unet,
    "vae-decode": _vae_decode,
    "picture": _picture,
}
