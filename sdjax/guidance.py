"""The denoiser's part in the loop: the UNet and its ControlNets, with and without the prompt, split by what changes.

Guidance is an axis: a row's two outputs, without and with its prompt, are one call of the UNet and one weighted sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sdjax.backend import one_by_one, precision, wide
from sdjax.batch import Conditioning
from sdjax.models import Definition, Params, bind, is_quantised
from sdjax.staging import split


class Denoiser(NamedTuple):
    """What a loop calls, in two pure functions.

    prepare: of (params, conditioning) to all that depends on nothing else, computed before the loop: transformed
        kernels, keys and values of the text, what ControlNets make of their pictures.
    predict: of (params, conditioning, prepared, table row of each batch row (batch,), latents (batch, height, width,
        channels), timesteps (batch,)) to the guided output, float32, like the latents.
    """

    prepare: Callable[[Params, Conditioning], Any]
    predict: Callable[[Params, Conditioning, Any, Array, Array, Array], Array]


class _Still(NamedTuple):
    """What a row keeps through the whole walk, with the axis of guidance, where there is one, behind the batch's."""

    context: Array
    added: Any
    timestep_condition: Array | None
    hints: list[tuple[Array, Array]]
    weights: Array
    rescale: Array | None


class _Moving(NamedTuple):
    """What changes from step to step; `scales` (batch, guidance) are the ControlNets'."""

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
    guidance = cond.weights.shape[0]
    at_once = 1 if one_by_one() else shape[0]
    networks = {name: params[name] for name in ("unet", *(name for name, _ in definition.controlnets))}

    def merged(x: Array) -> Array:
        """Rows of both sides of guidance as one batch: (batch, guidance, ...) to (guidance * batch, ...)."""
        x = x.swapaxes(0, 1)
        return x.reshape(guidance * x.shape[1], *x.shape[2:])

    def doubled(x: Array) -> Array:
        return merged(jnp.broadcast_to(x[:, None], (x.shape[0], guidance, *x.shape[1:])))

    def call(networks: Any, still: _Still, moving: _Moving) -> Array:
        sample, timesteps = doubled(moving.sample), doubled(moving.timesteps)
        context, added, condition = jax.tree.map(merged, (still.context, still.added, still.timestep_condition))
        residuals: list[Array] | None = None
        for (name, net), (image, falloff), scale in zip(
            definition.controlnets, still.hints, moving.scales, strict=True
        ):
            model = bind(net, networks[name])
            hint, falloff = doubled(model.hint(image)), doubled(falloff)
            said = model(sample[..., : model.config.in_channels], timesteps, context, hint, added)
            said = [wide(merged(scale) * falloff[:, k]) * x for k, x in enumerate(said)]
            residuals = said if residuals is None else [a + b for a, b in zip(residuals, said, strict=True)]
        unet = bind(definition.unet, networks["unet"])
        output: Array = unet(sample, timesteps, context, added, condition, residuals)
        output = output.reshape(guidance, -1, *output.shape[1:]).astype(jnp.float32)
        combined: Array = (wide(still.weights.swapaxes(0, 1)) * output).sum(0)
        spread = output[-1].std((1, 2, 3), keepdims=True)
        if guidance_axis is not None:
            has_prompt = lax.axis_index(guidance_axis) == lax.axis_size(guidance_axis) - 1
            both = combined, jnp.where(has_prompt, spread, 0)
            combined, spread = lax.psum(both, guidance_axis)  # type: ignore[no-untyped-call]
        return combined if still.rescale is None else _rescaled(combined, spread, still.rescale)

    def turns(rows: Any) -> Any:
        """Give the rows that are computed at once an axis, so that the others can be mapped over."""
        return jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), rows)

    def still_of(cond: Conditioning) -> Any:
        texts = (cond.context, cond.added, cond.timestep_condition, cond.weights)
        context, added, condition, weights = jax.tree.map(lambda x: x.swapaxes(0, 1), texts)
        hints = [(control.image, control.falloff) for control in cond.controls]
        return turns(_Still(context, added, condition, hints, weights, cond.rescale))

    def moving_of(cond: Conditioning, index: Array, latents: Array, timesteps: Array) -> Any:
        rows = jnp.arange(shape[0])
        scales = [control.scale[:, rows, index].swapaxes(0, 1) for control in cond.controls]
        return turns(_Moving(jnp.concatenate([latents, cond.extra], axis=-1), timesteps, scales))

    def shapes_of(function: Callable[..., Any], *arguments: Any) -> Any:
        return jax.eval_shape(lambda *arguments: jax.tree.map(lambda x: x[0], function(*arguments)), *arguments)

    index, timesteps = jnp.zeros(shape[:1], jnp.int32), jnp.zeros(shape[:1], jnp.float32)
    still = shapes_of(still_of, cond)
    moving = shapes_of(moving_of, cond, index, jnp.broadcast_to(jnp.float32(0), shape), timesteps)
    with precision(definition.dtype):
        of_weights, of_still, of_moving = split(call, networks, still, moving)

    def prepare(params: Params, cond: Conditioning) -> Any:
        networks_now = {name: params[name] for name in networks}
        with precision(definition.dtype):
            weights = of_weights(networks_now)
            return weights, _map(lambda still: of_still(networks_now, weights, still), still_of(cond))

    def predict(
        params: Params, cond: Conditioning, prepared: Any, index: Array, latents: Array, timesteps: Array
    ) -> Array:
        networks_now = {name: params[name] for name in networks}
        weights, kept = prepared
        rows = (still_of(cond), kept, moving_of(cond, index, latents, timesteps))
        if is_quantised(networks_now):
            # Tied to what changes from step to step, or XLA would make all kernels whole before the loop.
            networks_now, rows = lax.optimization_barrier((networks_now, rows))  # type: ignore[no-untyped-call]
        with precision(definition.dtype):
            output: Array = _map(lambda row: of_moving(networks_now, weights, *row), rows)
        return output.reshape(shape[0], *output.shape[2:])

    return Denoiser(prepare, predict)


def _map(function: Callable[[Any], Any], rows: Any) -> Any:
    """`lax.map`, without a loop where there is one turn."""
    if jax.tree.leaves(rows)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], rows)))
    return lax.map(function, rows)


def _rescaled(guided: Array, wanted: Array, share: Array) -> Array:
    """Bring a guided output's spread back to the prompted one's (Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16)."""
    spread = guided.std((1, 2, 3), keepdims=True)
    factor = 1 + wide(share) * (wanted / jnp.maximum(spread, 1e-30) - 1)
    return factor * guided
