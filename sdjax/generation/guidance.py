"""One call of the denoiser in the loop, with its ControlNets and classifier-free guidance.

Guidance is an axis: a row's two outputs, without and with its prompt, are one call and one weighted sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sdjax.devices.staging import stage_rows
from sdjax.devices.target import precision
from sdjax.generation.batch import Conditioning, per_image
from sdjax.models import Definition, Params, bind, is_quantised


class Denoiser(NamedTuple):
    """The denoiser in two pure functions, of which a loop calls the second.

    Attributes:
        prepare: of (params, conditioning), to what is computed before the loop: transformed kernels, keys and values of
            the text, the ControlNets' embeddings of their pictures.
        predict: of (params, conditioning, prepared, index, latents, timesteps), to the guided output. `index` (batch,)
            is each row's place in its sampler table, latents and output are (batch, height, width, channels) float32,
            timesteps (batch,).
    """

    prepare: Callable[[Params, Conditioning], Any]
    predict: Callable[[Params, Conditioning, Any, Array, Array, Array], Array]


class _Still(NamedTuple):
    """Each row's inputs that stay through the whole walk; the axis of guidance, where there is one, is the second."""

    context: Array
    added: Any
    hints: list[tuple[Array, Array]]
    weights: Array
    rescale: Array | None


class _Moving(NamedTuple):
    """Each row's inputs that change from step to step; `scales` (batch, guidance) are the ControlNets'."""

    sample: Array
    timesteps: Array
    scales: list[Array]


def stage_denoiser(
    definition: Definition,
    params: Params,
    cond: Conditioning,
    shape: tuple[int, ...],
    guidance_axis: str | None = None,
) -> Denoiser:
    """Trace the denoiser, and split it by what its parts depend on.

    Args:
        definition: static.
        params: of the whole checkpoint; only shapes and dtypes are read.
        cond: likewise.
        shape: of the latents, (batch, height, width, channels).
        guidance_axis: of the mesh, where each device along it has one half of guidance.
    """

    def networks(params: Params) -> dict[str, Any]:
        return {name: params[name] for name in definition.networks}

    batch = shape[:1]
    unmoved = jnp.zeros(batch, jnp.int32), jnp.broadcast_to(jnp.float32(0), shape), jnp.zeros(batch, jnp.float32)
    with precision(definition.dtype):
        staged = stage_rows(
            partial(_guided, definition, guidance_axis),
            networks(params),
            jax.eval_shape(_still, cond),
            jax.eval_shape(_moving, cond, *unmoved),
            at_once=1 if definition.target.rows_one_by_one else None,
            # Without it XLA hoists the dequantisation, and holds all weights in floating point through the loop.
            tie_constants=is_quantised(networks(params)),
        )

    def prepare(params: Params, cond: Conditioning) -> Any:
        with precision(definition.dtype):
            return staged.prepare(networks(params), _still(cond))

    def predict(
        params: Params, cond: Conditioning, prepared: Any, index: Array, latents: Array, timesteps: Array
    ) -> Array:
        with precision(definition.dtype):
            moving = _moving(cond, index, latents, timesteps)
            output: Array = staged.apply(networks(params), _still(cond), prepared, moving)
        return output

    return Denoiser(prepare, predict)


def _guided(definition: Definition, guidance_axis: str | None, networks: Any, still: _Still, moving: _Moving) -> Array:
    """Call the denoiser with and without the prompt, and weigh the two: (rows, height, width, channels) float32."""
    halves = still.weights.shape[1]
    both = partial(_for_each_half, halves)
    sample, timesteps = both(moving.sample), both(moving.timesteps)
    context, added = jax.tree.map(_merged, (still.context, still.added))
    residuals: list[Array] | None = None
    for (name, net), (image, falloff), scale in zip(definition.controlnets, still.hints, moving.scales, strict=True):
        model = bind(net, networks[name])
        hint = both(model.hint(image))
        maps = model(sample[..., : model.config.in_channels], timesteps, context, hint, added)
        scales = _merged(scale)[:, None] * both(falloff)
        maps = [per_image(scales[:, k]) * x for k, x in enumerate(maps)]
        residuals = maps if residuals is None else [a + b for a, b in zip(residuals, maps, strict=True)]
    denoiser = bind(definition.denoiser, networks[definition.family.component])
    output: Array = denoiser(sample, timesteps, context, added, residuals)
    output = output.reshape(halves, -1, *output.shape[1:]).astype(jnp.float32)
    guided: Array = (per_image(still.weights.swapaxes(0, 1)) * output).sum(0)
    spread = output[-1].std((1, 2, 3), keepdims=True)
    if guidance_axis is not None:
        has_prompt = lax.axis_index(guidance_axis) == lax.axis_size(guidance_axis) - 1
        parts = guided, jnp.where(has_prompt, spread, 0)
        guided, spread = lax.psum(parts, guidance_axis)  # type: ignore[no-untyped-call]
    return guided if still.rescale is None else _rescaled(guided, spread, still.rescale)


def _still(cond: Conditioning) -> _Still:
    context, added, weights = jax.tree.map(lambda x: x.swapaxes(0, 1), (cond.context, cond.added, cond.weights))
    hints = [(control.image, control.falloff) for control in cond.controls]
    return _Still(context, added, hints, weights, cond.rescale)


def _moving(cond: Conditioning, index: Array, latents: Array, timesteps: Array) -> _Moving:
    rows = jnp.arange(latents.shape[0])
    scales = [control.scale[:, rows, index].swapaxes(0, 1) for control in cond.controls]
    return _Moving(jnp.concatenate([latents, cond.extra], axis=-1), timesteps, scales)


def _merged(x: Array) -> Array:
    """Put the rows of one half of guidance behind those of the other: (rows, halves, ...) to (halves * rows, ...)."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _for_each_half(halves: int, x: Array) -> Array:
    """Repeat rows for each half of guidance: (rows, ...) to (halves * rows, ...)."""
    return _merged(jnp.broadcast_to(x[:, None], (x.shape[0], halves, *x.shape[1:])))


def _rescaled(guided: Array, wanted: Array, share: Array) -> Array:
    """Bring a guided output's spread back to the prompted one's (Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16)."""
    spread = guided.std((1, 2, 3), keepdims=True)
    factor = 1 + per_image(share) * (wanted / jnp.maximum(spread, 1e-30) - 1)
    return factor * guided
