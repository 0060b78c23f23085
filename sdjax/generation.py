"""From words to pictures in three pure functions: `encode_prompt`, `denoise` and `decode`.

Each is a function of (definition, params, arrays): it can be jitted (the definition is static), vmapped, sharded and
differentiated. Batch rows are independent: each has its own prompt, guidance, noise, sampler and place in it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpy.typing import NDArray

from sdjax.models import AddedConditioning, CLIPText, Definition, Params, bind
from sdjax.schedulers import HISTORY, Schedule
from sdjax.tiling import in_tiles

DECODED_AT_ONCE = 2**20
"""Pixels whose decoding may hold memory at one time; a batch beyond it is decoded in turns."""

MOST_RESCALED = 10.0
"""How far weights may change the scale of a prompt's hidden states, up or down, and have it restored."""

START_NOISE = 2**32 - 1
"""Stands where a step's index would, when the noise that a picture starts from is drawn from its key."""


class Tokens(NamedTuple):
    """Prompts for one text encoder, in chunks of its length.

    ids: (..., chunks, length) int32, with an end token in every chunk.
    weights: (..., chunks, length) float32, how much each token counts; 1 is plain.
    """

    ids: Array | NDArray[np.int32]
    weights: Array | NDArray[np.float32]


class Text(NamedTuple):
    """Encoded prompts: `context` (..., tokens, channels), and SDXL's `pooled` (..., channels), else None."""

    context: Array
    pooled: Array | None


class Known(NamedTuple):
    """The picture under the one that is painted: where the mask is 0 it stays, carried along at each step's level.

    mask: (batch, height, width, 1) float32, 1 where the sampler paints.
    latents: (batch, height, width, channels), clean.
    noise: likewise, of unit variance: the same at every step.
    """

    mask: Array
    latents: Array
    noise: Array


class Control(NamedTuple):
    """What one ControlNet sees, and how much it says.

    image: (batch, height * f, width * f, 3) float32 in 0..1.
    scale: (guidance, batch, rows) float32, a factor for every table row: 0 outside its share of the steps.
    falloff: (batch, feature maps) float32, a factor for every feature map, from the highest resolution down.
    """

    image: Array
    scale: Array
    falloff: Array


class Conditioning(NamedTuple):
    """What steers every row of a batch. What is None or empty takes no part, and no time.

    Guidance is an axis of its own, of length 2 (without and with the prompt) or, where no row asks for guidance, 1.

    context: (guidance, batch, tokens, channels), the encoded prompts.
    weights: (guidance, batch) float32: a row's output is the weighted sum, [1 - scale, scale], or [1].
    keys: (batch, 2) uint32, Threefry keys from which a row's noise is drawn, by step.
    extra: (batch, height, width, in_channels - latent channels): what an inpainting UNet sees beside the latents.
    added: SDXL's pooled text and time ids, each (guidance, batch, channels), else None.
    rescale: (batch,) float32, how far to bring the guided output back to the spread of the one with the prompt.
    known: what inpainting keeps.
    controls: one entry for each of the definition's ControlNets.
    timestep_condition: (guidance, batch, channels) for UNets that were distilled for an embedded guidance scale.
    """

    context: Array
    weights: Array
    keys: Array
    extra: Array
    added: AddedConditioning | None = None
    rescale: Array | None = None
    known: Known | None = None
    controls: tuple[Control, ...] = ()
    timestep_condition: Array | None = None


class Table(NamedTuple):
    """The part of a `Schedule` that the loop reads, float32, with a leading batch axis and padded rows.

    `signal` and `noise` are the level that a row leads to; after the last the latents are taken as clean, even where a
    model's own last level is not quite (`set_alpha_to_one` false).
    """

    timesteps: ArrayLike
    input_scale: ArrayLike
    A: ArrayLike
    B: ArrayLike
    C: ArrayLike
    signal: ArrayLike
    noise: ArrayLike


def encode_prompt(
    definition: Definition,
    params: Params,
    tokens: Sequence[Tokens],
    vectors: Sequence[ArrayLike] | None = None,
    clip_skip: ArrayLike = 0,
) -> Text:
    """Encode token ids.

    Args:
        definition: static.
        params: of the whole checkpoint.
        tokens: for each text encoder; `sdjax.prompts` makes them.
        vectors: for each text encoder (rows, width): the learned words that ids beyond the vocabulary stand for.
        clip_skip: (...) int32, or one for all: layers to leave out at the end, counted as diffusers counts (1 is
            AUTOMATIC1111's 2), less than the encoder has. Out of range it would be clamped without a word.

    Returns:
        The context of a prompt's chunks, one after the other: (..., chunks * length, channels). SD 1 and 2: the last
        hidden state that is not left out, normalised. SDXL: the one before it, of all encoders side by side and not
        normalised, and the last encoder's pooled vector of the first chunk, which `clip_skip` and weights leave alone.
    """
    states, pooled = [], None
    with _precision(definition):
        for i, ((name, encoder), given) in enumerate(zip(definition.text_encoders, tokens, strict=True)):
            ids, weights = jnp.asarray(given.ids), jnp.asarray(given.weights)
            *prompts, chunks, length = ids.shape
            skipped = jnp.broadcast_to(jnp.asarray(clip_skip, jnp.int32)[..., None], (*prompts, chunks))
            learned = None if vectors is None else jnp.asarray(vectors[i])
            read = partial(_read_chunks, bind(encoder, params[name]), learned, definition.is_xl)
            hidden, at_end = _by_row(read, (ids.reshape(-1, length), weights.reshape(-1, length), skipped.reshape(-1)))
            states.append(hidden.reshape(*prompts, chunks * length, -1))
            pooled = at_end.reshape(*prompts, chunks, -1)[..., 0, :]
    return Text(jnp.concatenate(states, axis=-1), pooled if definition.is_xl else None)


def _read_chunks(
    model: CLIPText, vectors: Array | None, is_xl: bool, rows: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """Encode chunks, (batch, length) ids and weights and (batch,) `clip_skip`: weighted states, and pooled vectors."""
    ids, weights, clip_skip = rows
    encoding = model(ids, vectors)
    states = jnp.stack(encoding.hidden_states)
    chosen = states[len(states) - 1 - is_xl - clip_skip, jnp.arange(len(ids))]
    return _weigh(chosen if is_xl else model.final_norm(chosen), weights), encoding.pooled


def _weigh(hidden: Array, weights: Array) -> Array:
    """Multiply hidden states by the weights of their tokens, then scale them so that their mean is as before.

    As AUTOMATIC1111 does, for each chunk of each encoder by itself (its mean is over all chunks of a batch, which would
    tie a picture to its mates). Left out is the scaling where there is no mean to speak of: one below a thousandth of
    the root mean square, of another sign than before, or more than `MOST_RESCALED` times it. There it would
    multiply a picture by noise, up to infinity.

    Args:
        hidden: (chunks, tokens, channels).
        weights: (chunks, tokens) float32. Where all of a chunk's are 1, its states stay what they are to the bit.
    """
    states = hidden.astype(jnp.float32)
    weighted = states * weights[..., None]
    before, after = (x.mean(axis=(1, 2), keepdims=True) for x in (states, weighted))
    size = jnp.sqrt(jnp.square(states).mean(axis=(1, 2), keepdims=True))
    ratio = before / jnp.where(after == 0, 1, after)
    sound = (jnp.abs(before) > 1e-3 * size) & (ratio >= 1 / MOST_RESCALED) & (ratio <= MOST_RESCALED)
    plain = (weights == 1).all(axis=1)[:, None, None]
    return (weighted * jnp.where(sound & ~plain, ratio, 1)).astype(hidden.dtype)


def denoise(
    definition: Definition,
    params: Params,
    cond: Conditioning,
    state: ArrayLike,
    table: Table,
    start: ArrayLike,
    stop: ArrayLike,
) -> Array:
    """Walk every row of a batch through rows `start` to `stop` of its own table.

    One `lax.fori_loop`; where one row stops before another it stands still. Python integers as bounds make a loop of
    known length, which differentiates in reverse; traced bounds serve any length with one executable.

    Args:
        definition: static.
        params: of the whole checkpoint.
        cond: what steers each row.
        state: (batch, 1 + HISTORY, height, width, channels) float32: the latents, then what a sampler remembers.
        table: the samplers, see `stack_tables`.
        start: the first table row to run, () or (batch,) integers.
        stop: the table row to stop before, likewise. Indices out of the table would be clamped without a word: keeping
            0 <= start and stop <= rows is the caller's part.

    Returns:
        The state after it, like `state`; `[:, 0]` are the latents, `[:, -1]` the estimate of the clean ones.
    """
    length: int | Array
    if isinstance(start, int) and isinstance(stop, int):
        length = stop - start
    else:
        length = jnp.max(jnp.asarray(stop) - jnp.asarray(start))
    state = jnp.asarray(state, jnp.float32)
    table = jax.tree.map(jnp.asarray, table)
    rows = jnp.arange(state.shape[0])
    hints = _hints(definition, params, cond)
    first, end = (jnp.broadcast_to(jnp.asarray(bound, jnp.int32), rows.shape) for bound in (start, stop))

    def body(i: ArrayLike, state: Array) -> Array:
        index = first + jnp.asarray(i, jnp.int32)
        row = jax.tree.map(lambda column: column[rows, index], table)
        controls = [
            Heard(hint, c.scale[:, rows, index], c.falloff) for hint, c in zip(hints, cond.controls, strict=True)
        ]
        output = _predict(definition, params, cond, _wide(row.input_scale) * state[:, 0], row.timesteps, controls)
        noise = draw_noise(cond.keys, index, output.shape[1:])
        moved = jnp.einsum("bij,bj...->bi...", row.A, state, precision=lax.Precision.HIGHEST)
        moved += _wide(row.B) * output[:, None] + _wide(row.C) * noise[:, None]
        if cond.known is not None:
            mask, latents, eps = cond.known
            kept = _wide(row.signal) * latents + _wide(row.noise) * eps
            moved = moved.at[:, 0].set(mask * moved[:, 0] + (1 - mask) * kept)
        return jnp.where(_wide(index < end)[:, None], moved, state)

    with _precision(definition):
        end_state: Array = lax.fori_loop(0, length, body, state)
    return end_state


def encode(definition: Definition, params: Params, pictures: ArrayLike, tile: int | None = None) -> Array:
    """Turn pictures into latents: the mean of what the autoencoder says, as many at once as memory allows.

    Args:
        definition: static.
        params: of the whole checkpoint.
        pictures: (batch, height, width, 3) in 0..1, sides multiples of f.
        tile: side, in latents, of the tiles that are encoded one after another; None encodes a picture whole.

    Returns:
        (batch, height / f, width / f, channels) float32, scaled as the denoiser has them.
    """
    config = definition.vae_config
    pictures = 2 * jnp.asarray(pictures, jnp.float32) - 1
    at_once = max(1, DECODED_AT_ONCE // (pictures.shape[1] * pictures.shape[2]))
    with _precision(definition):
        vae = bind(definition.vae, params["vae"])
        means: Array = _by_row(in_tiles(lambda x: vae.encode(x).mean, tile, config.factor, 1), pictures, at_once)
    return means * config.scaling_factor


def decode(definition: Definition, params: Params, latents: ArrayLike, tile: int | None = None) -> Array:
    """Turn latents into pictures, as many at once as a fixed bound on memory allows.

    Args:
        definition: static.
        params: of the whole checkpoint.
        latents: (batch, height, width, channels), scaled as the denoiser has them.
        tile: side, in latents, of the tiles that are decoded one after another, overlapping by a quarter and blended;
            memory stops growing with the picture there. An autoencoder's norms look at a whole picture, so tiles differ
            a little from it. None decodes a picture whole.

    Returns:
        (batch, height * f, width * f, 3) float32 in 0..1; NaN where the latents are.
    """
    config = definition.vae_config
    latents = jnp.asarray(latents, jnp.float32) / config.scaling_factor
    at_once = max(1, DECODED_AT_ONCE // (latents.shape[1] * latents.shape[2] * config.factor**2))
    with _precision(definition):
        vae = bind(definition.vae, params["vae"])
        pictures = _by_row(in_tiles(vae.decode, tile, 1, config.factor), latents, at_once)
    return jnp.clip(pictures / 2 + 0.5, 0.0, 1.0)


def put_row(batch: "Batch", slot: ArrayLike, source: "Batch", row: ArrayLike) -> "Batch":
    """Copy row `row` of one batch into row `slot` of another of equal structure; both may be traced."""

    def put(axis: int, into: Array, taken: Array) -> Array:
        new = jnp.take(jnp.asarray(taken), jnp.asarray(row), axis=axis)
        return jnp.moveaxis(
            jnp.moveaxis(jnp.asarray(into), axis, 0).at[slot].set(jnp.moveaxis(new, axis, axis)), 0, axis
        )

    replaced: Batch = jax.tree.map(put, _batch_axes(batch), batch, source)
    return replaced


class Batch(NamedTuple):
    """All that the loop takes beside the weights; `start` and `stop` (batch,) int32 bound each row's walk."""

    cond: Conditioning
    state: Array
    table: Table
    start: Array
    stop: Array


def join(batches: Sequence["Batch"]) -> "Batch":
    """Put batches of equal structure one behind the other: the rows of the first come first."""

    def joined(axis: int, *parts: ArrayLike) -> Array:
        return jnp.concatenate([jnp.asarray(part) for part in parts], axis)

    whole: Batch = jax.tree.map(joined, _batch_axes(batches[0]), *batches)
    return whole


def _batch_axes(batch: Batch) -> Batch:
    """Which axis of each array counts the rows of the batch: the one after guidance, where there is guidance."""
    axes = jax.tree.map(lambda _: 0, batch)
    behind = {
        name: jax.tree.map(lambda _: 1, getattr(batch.cond, name))
        for name in ("context", "weights", "added", "timestep_condition")
    }
    controls = tuple(control._replace(scale=1) for control in axes.cond.controls)
    marked: Batch = axes._replace(cond=axes.cond._replace(**behind, controls=controls))
    return marked


def draw_noise(keys: ArrayLike, index: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Standard normal noise of each row, from its key and its step alone: batch mates and slices don't change it.

    Args:
        keys: (batch, 2) uint32.
        index: () or (batch,), a table row, or `START_NOISE`.
        shape: of one row.

    Returns:
        (batch, *shape) float32, the same with any of JAX's generator settings.
    """
    # The implementation is named and its layout pinned: both depend on global settings, which must not change pictures.
    with jax.threefry_partitionable(True):
        wrapped = jax.random.wrap_key_data(jnp.asarray(keys, jnp.uint32), impl="threefry2x32")
        index = jnp.broadcast_to(jnp.asarray(index, jnp.uint32), wrapped.shape)
        return jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(
            wrapped, index
        )


def seed_keys(seeds: Sequence[int]) -> NDArray[np.uint32]:
    """The Threefry keys of seeds, each 0 to 2**64 - 1: (batch, 2)."""
    return np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def stack_tables(schedules: Sequence[Schedule], rows: int) -> Table:
    """Put one schedule a batch row side by side, padded to `rows` table rows, which are never reached."""

    def column(name: str) -> NDArray[np.float32]:
        parts = [getattr(schedule, name)[-len(schedule.step) :] for schedule in schedules]
        padded = [np.pad(part, [(0, rows - len(part))] + [(0, 0)] * (part.ndim - 1)) for part in parts]
        return np.stack(padded).astype(np.float32)

    stacked = {name: column(name) for name in Table._fields}
    for row, schedule in enumerate(schedules):
        last = len(schedule.step) - 1
        stacked["signal"][row, last], stacked["noise"][row, last] = 1, 0
    return Table(**stacked)


def start_state(scale: ArrayLike, noise: ArrayLike, latents: ArrayLike = 0.0) -> Array:
    """The state that a walk starts from: nothing remembered, and latents that are noise, or a picture under noise.

    Args:
        scale: (batch,), what noise is multiplied by: each schedule's `init_noise`, or its `noise` at the first row.
        noise: (batch, height, width, channels), of unit variance.
        latents: what lies under the noise, already multiplied by the first row's `signal`.

    Returns:
        (batch, 1 + HISTORY, height, width, channels) float32.
    """
    latents = latents + _wide(scale) * jnp.asarray(noise, jnp.float32)
    return jnp.pad(latents[:, None], [(0, 0), (0, HISTORY), (0, 0), (0, 0), (0, 0)])


class Heard(NamedTuple):
    """One ControlNet's part in one step: its hint (batch, h, w, channels), scale (guidance, batch) and falloff."""

    hint: Array
    scale: Array
    falloff: Array


def _hints(definition: Definition, params: Params, cond: Conditioning) -> list[Array]:
    """What each ControlNet makes of its picture, which is the same at every step."""
    return [
        _by_row(bind(model, params[name]).hint, control.image)
        for (name, model), control in zip(definition.controlnets, cond.controls, strict=True)
    ]


def _predict(
    definition: Definition,
    params: Params,
    cond: Conditioning,
    latents: Array,
    timesteps: Array,
    controls: Sequence[Heard],
) -> Array:
    """Call the UNet once for all rows with and without their prompts, and combine: float32, like the latents."""
    guidance = cond.weights.shape[0]
    unet = bind(definition.unet, params["unet"])
    controlnets = [bind(model, params[name]) for name, model in definition.controlnets]

    def merged(x: Array) -> Array:
        return x.reshape(guidance * x.shape[1], *x.shape[2:])

    def call(rows: Any) -> Array:
        sample, timesteps, hints, rescale, weights, by_guidance = rows
        sample, timesteps, hints = jax.tree.map(
            lambda x: merged(jnp.broadcast_to(x, (guidance, *x.shape))), (sample, timesteps, hints)
        )
        context, added, condition, scales = jax.tree.map(lambda x: merged(x.swapaxes(0, 1)), by_guidance)
        residuals = None
        for model, (hint, falloff), scale in zip(controlnets, hints, scales, strict=True):
            said = model(sample[..., : model.config.in_channels], timesteps, context, hint, added)
            said = [_wide(scale * falloff[:, k]) * x for k, x in enumerate(said)]
            residuals = said if residuals is None else [a + b for a, b in zip(residuals, said, strict=True)]
        output: Array = unet(sample, timesteps, context, added, condition, residuals)
        output = output.reshape(guidance, -1, *output.shape[1:]).astype(jnp.float32)
        combined: Array = (_wide(weights.swapaxes(0, 1)) * output).sum(0)
        return combined if rescale is None else _rescaled(combined, output[-1], rescale)

    sample = jnp.concatenate([latents, cond.extra], axis=-1)
    by_guidance = (cond.context, cond.added, cond.timestep_condition, [control.scale for control in controls])
    by_guidance = jax.tree.map(lambda x: x.swapaxes(0, 1), by_guidance)
    hints = [(control.hint, control.falloff) for control in controls]
    weights = cond.weights.swapaxes(0, 1)
    combined: Array = _by_row(call, (sample, timesteps, hints, cond.rescale, weights, by_guidance))
    return combined


def _rescaled(guided: Array, prompted: Array, share: Array) -> Array:
    """Bring a guided output's spread back to the prompted one's (Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16)."""
    spread, wanted = (x.std((1, 2, 3), keepdims=True) for x in (guided, prompted))
    factor = 1 + _wide(share) * (wanted / jnp.maximum(spread, 1e-30) - 1)
    return factor * guided


def _by_row(function: Callable[[Any], Any], rows: Any, at_once: int | None = None) -> Any:
    """Apply a function of a batch, on a CPU one row at a time.

    How a CPU's matrix product sums depends on its shape, so in a shared batch a row's last bits depend on its mates,
    and a seed would not give the same bytes alone. A batch gains it little: one row keeps its cores busy.

    Args:
        function: of a tree of arrays with a leading batch axis, to the like.
        rows: its argument.
        at_once: rows that a call may take elsewhere, where memory sets a bound.
    """
    batch = jax.tree.leaves(rows)[0].shape[0]
    if jax.default_backend() != "cpu" and (at_once is None or batch <= at_once):
        return function(rows)

    def one(row: Any) -> Any:
        return jax.tree.map(lambda x: x[0], function(jax.tree.map(lambda x: x[None], row)))

    return lax.map(one, rows, batch_size=None if jax.default_backend() == "cpu" else at_once)


def _wide(x: ArrayLike) -> Array:
    """Give numbers the height, width and channels that they are the same for."""
    return jnp.asarray(x)[..., None, None, None]


def _precision(definition: Definition) -> Any:
    """float32 means float32: TPUs and recent GPUs would round the factors of a product, unless told not to."""
    return jax.default_matmul_precision("highest" if definition.dtype == "float32" else "default")
