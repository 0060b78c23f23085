"""sdjax itself, through its pure functions."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

import sdjax
from benchmarks import random_values
from benchmarks.cases import FROM_FOLDER, MATMUL_SIZE, Case, Prepared, Skipped
from benchmarks.sides import served
from sdjax import bench
from sdjax.bench import Inputs, Work
from sdjax.devices.target import local_target
from sdjax.devices.xla_flags import set_flags
from sdjax.measuring import peak_bytes_of_children
from sdjax.models import (
    SD,
    SDXL,
    VAE,
    CLIPText,
    CLIPTextConfig,
    Definition,
    UNet,
    UNetConfig,
    VAEConfig,
    bind,
    define,
)
from sdjax.models.kernels import PLAIN, forms_for
from sdjax.models.quantised import is_large_weight, quantise_weight

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def prepare(case: Case) -> Prepared:
    """Make a case ready on JAX's default backend."""
    set_flags()
    if jax.default_backend() != case.device:
        raise Skipped(f"JAX runs on {jax.default_backend()} here, not on {case.device}")
    if case.what in FROM_FOLDER and case.dtype == "int8":
        raise Skipped("int8 weights are timed in the parts of drawing")
    if case.what in FROM_FOLDER:
        if case.folder is None:
            raise Skipped("there is no folder to read: diffusers, which writes it, is absent")
        return WITH_FOLDER[case.what](case)
    parts, work, plain = CASES[case.what]
    definition, params = build(case, *parts)
    inputs = bench.random_inputs(
        definition,
        list(case.sizes.text_encoders.values()),
        size=(case.sizes.size, case.sizes.size),
        batch=case.batch,
        guidance_scale=case.guidance_scale,
    )
    # First: what counting leaves in memory is not the model's.
    flops = None if plain is None else _flops(partial(plain, definition.with_forms(PLAIN), inputs), params)
    ready = work(case, definition, params, inputs)
    return Prepared(ready.run, _matmul(case), flops, ready.notes)


def _flops(plain: Callable[[Any], Any], params: Any) -> float | None:
    """Operations by XLA's analysis of the plain formulation: what Winograd's forms save is speed, not less work done.

    The analysis counts the body of a loop once, so attention in blocks would be missing too.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    analysis = jax.jit(lambda params: plain(params)).lower(shapes).cost_analysis()
    return None if not analysis else float(analysis["flops"])


def build(case: Case, *parts: str) -> tuple[Definition, Any]:
    """A definition and random parameters of the named parts ("unet", "vae", "text"), the others without weights."""
    sizes, dtype = case.sizes, case.arithmetic
    models: dict[str, tuple[Any, Any]] = {
        "unet": (UNet, UNetConfig.from_dict(sizes.unet)),
        "vae": (VAE, VAEConfig.from_dict(sizes.vae)),
        **{name: (CLIPText, CLIPTextConfig.from_dict(config)) for name, config in sizes.text_encoders.items()},
    }
    definitions, params = {}, {}
    for name, (model, config) in models.items():
        definitions[name], shapes = define(model, config, dtype=dtype, param_dtype=dtype)
        if name in parts or (name in sizes.text_encoders and "text" in parts):
            params[name] = shapes
    definition = Definition(
        family=SDXL if sizes.unet.get("addition_embed_type") else SD,
        denoiser=definitions["unet"],
        vae=definitions["vae"],
        text_encoders=tuple((name, definitions[name]) for name in sizes.text_encoders),
        dtype=dtype,
        target=local_target(),
    )
    return definition, FrozenDict(_filled(params, quantises=case.dtype == "int8"))


def _filled(shapes: Any, *, quantises: bool) -> Any:
    leaves: dict[Any, Any] = {}
    for offset, (path, leaf) in enumerate(flatten_dict(shapes).items()):
        fan_in = int(np.prod(leaf.shape[1:], dtype=int))
        value = random_values.weight(leaf.shape, fan_in, offset, is_scale=path[-1] == "weight" and leaf.ndim == 1)
        array = jnp.array(value, leaf.dtype)
        # One at a time, as loading does: the tree is never whole in its first dtype.
        stored = quantise_weight(array) if quantises and is_large_weight(path, leaf.shape) else array
        leaves[path] = jax.block_until_ready(stored)
    return unflatten_dict(leaves)


def _plain_text(definition: Definition, inputs: Inputs, params: Any) -> Any:
    encoders = zip(definition.text_encoders, inputs.tokens, strict=True)
    return [bind(encoder, params[name])(x.ids.reshape(-1, x.ids.shape[-1])) for (name, encoder), x in encoders]


def _plain_unet(definition: Definition, inputs: Inputs, params: Any) -> Any:
    cond, latents = inputs.cond, inputs.latents
    rows = cond.context.shape[0] * cond.context.shape[1]
    sample = jnp.broadcast_to(latents[:1], (rows, *latents.shape[1:]))
    context, added = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), (cond.context, cond.added))
    return bind(definition.denoiser, params["unet"])(sample, jnp.full(rows, bench.TIMESTEP), context, added)


def _plain_decoder(definition: Definition, inputs: Inputs, params: Any) -> Any:
    return bind(definition.vae, params["vae"]).decode(inputs.latents)


def _picture(case: Case, definition: Definition, params: Any, inputs: Inputs) -> Work:
    scheduler = sdjax.schedulers.SchedulerConfig.from_dict(SCHEDULER)
    return bench.picture(definition, params, inputs, scheduler, case.step_count, "ddim")


def _loading(case: Case) -> Prepared:
    return Prepared(bench.loading(case.folder, dtype=case.dtype).run, _matmul(case))


def _first_picture(case: Case) -> Prepared:
    options = ["--guidance", str(case.guidance_scale), "--sampler", "ddim", "--size", str(case.sizes.size)]
    work = bench.first_picture(
        str(case.folder),
        steps=case.step_count,
        dtype=case.dtype,
        options=options,
        keeps_programs=case.what == "first-warm",
    )
    return Prepared(work.run, peak_bytes=peak_bytes_of_children)


def _matmul(case: Case) -> Callable[[], object]:
    left, right = (jnp.asarray(random_values.normal((MATMUL_SIZE, MATMUL_SIZE), i), case.arithmetic) for i in range(2))
    product = jax.jit(forms_for(local_target()).product)
    return lambda: jax.block_until_ready(product(left, right))


def _of_models(work: Callable[..., Work]) -> Callable[..., Work]:
    return lambda case, definition, params, inputs: work(definition, params, inputs)


CASES: Mapping[str, tuple[Sequence[str], Callable[..., Work], Callable[..., Any] | None]] = {
    "text-encoder": (("text",), _of_models(bench.text_encoder), _plain_text),
    "unet": (("unet",), _of_models(bench.unet_step), _plain_unet),
    "vae-decode": (("vae",), _of_models(bench.vae_decode), _plain_decoder),
    "picture": (("unet", "vae", "text"), _picture, None),
}
"""The parts that a case needs, its work in `sdjax.bench`, and the same without loops over rows, for counting."""

WITH_FOLDER: Mapping[str, Callable[[Case], Prepared]] = {
    "load": _loading,
    "first-cold": _first_picture,
    "first-warm": _first_picture,
    "throughput": served.prepare,
}
