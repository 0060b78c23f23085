"""From a checked request to the arrays that the loop takes."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array
from numpy.typing import NDArray

from sdjax.canvas import latent_mask
from sdjax.devices.sharding import mesh_of, placer
from sdjax.errors import RequestError
from sdjax.generation import START_NOISE, Text, compiled, draw_noise
from sdjax.generation.batch import Batch, Conditioning, Control, Known, seed_keys, stack_tables, start_state
from sdjax.inputs import Steering
from sdjax.loading import Checkpoint, load_controlnet
from sdjax.models import Definition, Params
from sdjax.prompts import text_inputs
from sdjax.requests import Request

_start_noise = jax.jit(partial(draw_noise, index=START_NOISE), static_argnames="shape")


@jax.jit
def _start_state(scale: Array, noise: Array, signal: Array, under: Array) -> Array:
    return start_state(scale, noise, signal * under)


class Weights(NamedTuple):
    """What a request is drawn with: a model, with the adapters and ControlNets that the request names.

    Attributes:
        definition: with the ControlNets.
        params: with the adapters merged, and the ControlNets' own.
        key: equal where rows may share a batch: for adapters of equal contents and weights, and the same ControlNets.
    """

    definition: Definition
    params: Params
    key: Hashable


class Drawing(NamedTuple):
    """A drawing under way: everything that the loop needs, so that nothing is looked up between two slices."""

    weights: Weights
    batch: Batch

    @property
    def definition(self) -> Definition:
        """Static: the models, ControlNets among them."""
        return self.weights.definition

    @property
    def params(self) -> Params:
        """The parameters of all of them."""
        return self.weights.params


def with_controlnets(weights: Weights, controls: Sequence[Steering]) -> Weights:
    """The same model with ControlNets at its side, read now."""
    if not controls:
        return weights
    definition, params, key = weights
    named, trees = [], {}
    place = placer(mesh_of(params), definition.family.splits)
    for i, control in enumerate(controls):
        denoiser = definition.denoiser.config
        net, tree, config = load_controlnet(
            control.model, like=denoiser, dtype=definition.dtype, target=definition.target, place=place
        )
        if reason := config.misfit(denoiser):
            raise RequestError(f"{control.model.source} is for another model: {reason}")
        named.append((f"controlnet_{i}", net))
        trees[f"controlnet_{i}"] = tree
    # A folder that has not changed gives the same tree, which lives as long as the drawings that have it.
    key = (key, tuple(map(id, trees.values())))
    return Weights(replace(definition, controlnets=tuple(named)), FrozenDict({**params, **trees}), key)


def prepare(checkpoint: Checkpoint, weights: Weights, request: Request) -> Drawing:
    """Encode words and pictures, draw the start noise, lay out the sampler: every picture of the request a row.

    Args:
        checkpoint: the request's.
        weights: that the request is drawn with.
        request: of `sdjax.requests.resolve`.
    """
    definition, params = weights.definition, weights.params
    batch = len(request.seeds)
    keys = jax.device_put(seed_keys(request.seeds))
    walk, first = request.table, request.first_row
    noise = _start_noise(keys, shape=request.latent_shape) if request.latents is None else jnp.asarray(request.latents)
    known, extra, under = _pictures(definition, params, request, noise)
    scale = 1.0 if request.resumes else float(walk.init_noise if first == 0 else walk.noise[first])
    signal = 0.0 if first == 0 else float(walk.signal[first])
    stacked = stack_tables([walk] * batch, 2 * checkpoint.scheduler.num_train_timesteps)
    made = Batch(
        cond=_conditioning(checkpoint, definition, params, request, known, extra, keys),
        state=_start_state(np.full(batch, scale, np.float32), noise, np.float32(signal), under),
        table=jax.device_put(stacked),
        start=jax.device_put(np.full(batch, first, np.int32)),
        stop=jax.device_put(np.full(batch, request.stop_row, np.int32)),
    )
    return Drawing(weights, made)


def _pictures(definition: Definition, params: Params, request: Request, noise: Array) -> tuple[Known, Array, Array]:
    """What inpainting keeps, what an inpainting UNet sees, and the latents that the walk starts over."""
    shape = (len(request.seeds), *request.latent_shape)
    # Made by NumPy, like all that is not worth a compiled program of its own.
    nothing = jax.device_put(np.zeros(shape, np.float32))
    everything = jax.device_put(np.ones((*shape[:3], 1), np.float32))
    unseen = jax.device_put(np.zeros((*shape[:3], 0), np.float32))
    if not request.canvases:
        return Known(everything, nothing, nothing), unseen, nothing
    pixels = np.stack([entry.pixels for entry in request.canvases]).astype(np.float32) / 255
    latents = compiled.encode(definition, params, pixels, tile=request.tile)
    if not request.repaints:
        return Known(everything, nothing, nothing), unseen, latents
    masks = np.stack([entry.mask for entry in request.canvases])
    factor = definition.vae_config.factor
    if definition.inpaints:
        # These UNets were trained on pictures greyed out under masks of zeros and ones.
        hard = (masks >= 0.5).astype(np.float32)
        grey = np.where(hard[..., None] > 0, np.float32(0.5), pixels)
        seen = compiled.encode(definition, params, grey, tile=request.tile)
        extra = jax.device_put(np.concatenate([_latent_masks(hard, factor), seen], axis=-1))
        return Known(everything, nothing, nothing), extra, latents
    return Known(jax.device_put(_latent_masks(masks, factor)), latents, noise), unseen, latents


def _latent_masks(masks: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    return np.stack([latent_mask(mask, factor) for mask in masks])


def _conditioning(
    checkpoint: Checkpoint,
    definition: Definition,
    params: Params,
    request: Request,
    known: Known,
    extra: Array,
    keys: Array,
) -> Conditioning:
    batch = len(request.seeds)
    guided = request.guidance_scale > 1 and not definition.denoiser_config.embeds_guidance
    text = _text(checkpoint, definition, params, request, guided)
    scale = request.guidance_scale
    weights = np.array([[1 - scale], [scale]] if guided else [[1.0]], np.float32).repeat(batch, axis=1)
    return Conditioning(
        context=text.context,
        weights=jax.device_put(weights),
        keys=keys,
        extra=extra,
        added=definition.family.added(definition.denoiser_config, text, request.conditions),
        rescale=jax.device_put(np.full(batch, request.guidance_rescale, np.float32)),
        known=known,
        controls=tuple(
            _control(checkpoint, control, request, guided, feature_maps)
            for control, feature_maps in zip(request.controls, _feature_maps(definition), strict=True)
        ),
    )


def _text(checkpoint: Checkpoint, definition: Definition, params: Params, request: Request, guided: bool) -> Text:
    batch = len(request.seeds)
    prompts: list[str | None] = [*request.negative_prompts, *request.prompts] if guided else [*request.prompts]
    words = [prompt or "" for prompt in prompts]
    # What is cut is in the request's warnings.
    inputs = text_inputs(checkpoint, words, request.reading, warn=lambda _: None)
    tokens = jax.tree.map(lambda x: x.reshape(-1, batch, *x.shape[1:]), inputs.tokens)
    # As in diffusers the negative prompt keeps all layers.
    skipped = np.array([0, request.reading.clip_skip or 0], np.int32)[-len(words) // batch :, None].repeat(batch, 1)
    definition = replace(definition, controlnets=())
    text: Text = compiled.encode_prompt(definition, params, tokens, inputs.vectors, skipped)
    if checkpoint.configs["model_index"].get("force_zeros_for_empty_prompt", definition.family.zeroes_empty_prompts):
        said = np.array([prompt is not None for prompt in prompts], np.float32).reshape(-1, batch)
        text = jax.tree.map(lambda x: x * said.reshape(*said.shape, *[1] * (x.ndim - 2)).astype(x.dtype), text)
    return text


def _feature_maps(definition: Definition) -> list[int]:
    return [net.config.feature_maps for _, net in definition.controlnets]


def _control(checkpoint: Checkpoint, control: Steering, request: Request, guided: bool, feature_maps: int) -> Control:
    batch = len(request.seeds)
    rows = 2 * checkpoint.scheduler.num_train_timesteps
    step = np.pad(request.table.step, (0, rows - len(request.table.step)), constant_values=-1)
    # As in diffusers: a step belongs to the share of the steps that it lies in as a whole.
    speaks = (step / request.steps >= control.start) & ((step + 1) / request.steps <= control.end)
    scale = np.where(speaks, control.scale, 0).astype(np.float32)
    sides = np.array([0.0 if control.guess else 1.0, 1.0] if guided else [1.0], np.float32)
    falloff: NDArray[Any] = np.logspace(-1, 0, feature_maps) if control.guess else np.ones(feature_maps)
    picture = control.pixels.astype(np.float32) / np.float32(255)
    return Control(
        image=jax.device_put(np.broadcast_to(picture, (batch, *picture.shape))),
        scale=jax.device_put(np.broadcast_to((sides[:, None] * scale)[:, None], (len(sides), batch, rows))),
        falloff=jax.device_put(np.broadcast_to(falloff.astype(np.float32), (batch, feature_maps))),
    )
