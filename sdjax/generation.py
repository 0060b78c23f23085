"""From words to pictures in three pure functions: `encode_prompt`, `denoise` and `decode`.

Each is a function of (definition, params, arrays): it can be jitted (the definition is static), vmapped, sharded and
differentiated. Batch rows are independent: each has its own prompt, guidance, noise, sampler and place in it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpy.typing import NDArray

from sdjax.models import AddedConditioning, Definition, Params, bind
from sdjax.schedulers import HISTORY, Schedule
from sdjax.staging import split

DECODED_AT_ONCE = 2**20
"""Pixels whose decoding may hold memory at one time; a batch beyond it is decoded in turns."""

START_NOISE = 2**32 - 1
"""Stands where a step's index would, when the noise that a picture starts from is drawn from its key."""


class Text(NamedTuple):
    """Encoded prompts: `context` (..., tokens, channels), and SDXL's `pooled` (..., channels), else None."""

    context: Array
    pooled: Array | None


class Conditioning(NamedTuple):
    """What steers every row of a batch.

    Guidance is an axis of its own, of length 2 (without and with the prompt) or, where no row asks for guidance, 1.

    context: (guidance, batch, tokens, channels), the encoded prompts.
    weights: (guidance, batch) float32: a row's output is the weighted sum, [1 - scale, scale], or [1].
    keys: (batch, 2) uint32, Threefry keys from which a row's noise is drawn, by step.
    extra: (batch, height, width, in_channels - latent channels): what an inpainting UNet sees beside the latents.
    added: SDXL's pooled text and time ids, each (guidance, batch, channels), else None.
    """

    context: Array
    weights: Array
    keys: Array
    extra: Array
    added: AddedConditioning | None


class Table(NamedTuple):
    """The part of a `Schedule` that the loop reads, float32, with a leading batch axis and padded rows."""

    timesteps: ArrayLike
    input_scale: ArrayLike
    A: ArrayLike
    B: ArrayLike
    C: ArrayLike


def encode_prompt(definition: Definition, params: Params, token_ids: Sequence[ArrayLike]) -> Text:
    """Encode token ids.

    Args:
        definition: static.
        params: of the whole checkpoint.
        token_ids: for each text encoder (..., tokens) int32, with an end token in every row.

    Returns:
        SD 1 and 2: the last hidden state, normalised. SDXL: the penultimate states of all encoders, side by side and
        not normalised, and the last encoder's pooled vector.
    """
    states, pooled = [], None
    with _precision(definition):
        for (name, encoder), ids in zip(definition.text_encoders, token_ids, strict=True):
            ids = jnp.asarray(ids)
            model = bind(encoder, params[name])
            encoding = _by_row(model, ids.reshape(-1, ids.shape[-1]))
            hidden = encoding.hidden_states[-2] if definition.is_xl else model.final_norm(encoding.hidden_states[-1])
            states.append(hidden.reshape(*ids.shape, -1))
            pooled = encoding.pooled.reshape(*ids.shape[:-1], -1)
    return Text(jnp.concatenate(states, axis=-1), pooled if definition.is_xl else None)


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
    first, end = (jnp.broadcast_to(jnp.asarray(bound, jnp.int32), rows.shape) for bound in (start, stop))

    unet = params["unet"]
    with _precision(definition):
        staged = stage_unet(definition, unet, cond, (state.shape[0], *state.shape[2:]))
    prepared = staged.prepare(unet, cond)

    def body(i: ArrayLike, state: Array) -> Array:
        index = first + jnp.asarray(i, jnp.int32)
        row = jax.tree.map(lambda column: column[rows, index], table)
        output = staged.predict(unet, cond, prepared, _wide(row.input_scale) * state[:, 0], row.timesteps)
        noise = draw_noise(cond.keys, index, output.shape[1:])
        moved = jnp.einsum("bij,bj...->bi...", row.A, state, precision=lax.Precision.HIGHEST)
        moved += _wide(row.B) * output[:, None] + _wide(row.C) * noise[:, None]
        return jnp.where(_wide(index < end)[:, None], moved, state)

    with _precision(definition):
        end_state: Array = lax.fori_loop(0, length, body, state)
    return end_state


def decode(definition: Definition, params: Params, latents: ArrayLike) -> Array:
    """Turn latents into pictures, as many at once as a fixed bound on memory allows.

    Args:
        definition: static.
        params: of the whole checkpoint.
        latents: (batch, height, width, channels), scaled as the denoiser has them.

    Returns:
        (batch, height * f, width * f, 3) float32 in 0..1; NaN where the latents are.
    """
    config = definition.vae_config
    latents = jnp.asarray(latents, jnp.float32) / config.scaling_factor
    at_once = max(1, DECODED_AT_ONCE // (latents.shape[1] * latents.shape[2] * config.factor**2))
    with _precision(definition):
        pictures = _by_row(bind(definition.vae, params["vae"]).decode, latents, at_once)
    return jnp.clip(pictures / 2 + 0.5, 0.0, 1.0)


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
        parts = [getattr(schedule, name) for schedule in schedules]
        padded = [np.pad(part, [(0, rows - len(part))] + [(0, 0)] * (part.ndim - 1)) for part in parts]
        return np.stack(padded).astype(np.float32)

    return Table(*(column(name) for name in Table._fields))


def start_state(scale: ArrayLike, noise: ArrayLike) -> Array:
    """The state that pure noise starts from: scaled as each row's sampler wants it, nothing remembered.

    Args:
        scale: (batch,), each schedule's `init_noise`.
        noise: (batch, height, width, channels), of unit variance.

    Returns:
        (batch, 1 + HISTORY, height, width, channels) float32.
    """
    latents = _wide(scale) * jnp.asarray(noise, jnp.float32)
    return jnp.pad(latents[:, None], [(0, 0), (0, HISTORY), (0, 0), (0, 0), (0, 0)])


class StagedUNet(NamedTuple):
    """The UNet's part in a loop, split by what changes in it; both are pure functions.

    prepare: of (the UNet's params, conditioning) to what depends on nothing else, computed before the loop:
        transformed kernels, keys and values of the text.
    predict: of (the UNet's params, conditioning, prepared, latents (batch, height, width, channels), timesteps
        (batch,)) to the guided output, float32, like the latents.
    """

    prepare: Callable[[Params, Conditioning], Any]
    predict: Callable[[Params, Conditioning, Any, Array, Array], Array]


def stage_unet(definition: Definition, params: Params, cond: Conditioning, shape: tuple[int, ...]) -> StagedUNet:
    """Trace the UNet, with and without their prompts for all rows, and split it.

    Args:
        definition: static.
        params: of the UNet; only shapes and dtypes are read.
        cond: likewise.
        shape: of the latents, (batch, height, width, channels).
    """
    guidance = cond.weights.shape[0]
    at_once = 1 if jax.default_backend() == "cpu" else shape[0]

    def merged(x: Array) -> Array:
        return x.reshape(guidance * x.shape[1], *x.shape[2:])

    def call(params: Params, texts: tuple[Array, AddedConditioning | None], moving: tuple[Array, Array]) -> Array:
        sample, timesteps = (merged(jnp.broadcast_to(x, (guidance, *x.shape))) for x in moving)
        context, added = jax.tree.map(lambda x: merged(x.swapaxes(0, 1)), texts)
        output: Array = bind(definition.unet, params)(sample, timesteps, context, added)
        return output.reshape(guidance, -1, *output.shape[1:]).swapaxes(0, 1)

    def turns(rows: Any) -> Any:
        """Give the rows that are computed at once an axis, so that the others can be mapped over."""
        return jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), rows)

    def texts_of(cond: Conditioning) -> Any:
        return turns(jax.tree.map(lambda x: x.swapaxes(0, 1), (cond.context, cond.added)))

    def moving_of(cond: Conditioning, latents: Array, timesteps: Array) -> Any:
        return turns((jnp.concatenate([latents, cond.extra], axis=-1), timesteps))

    def shapes_of(function: Callable[..., Any], *arguments: Any) -> Any:
        return jax.eval_shape(lambda *arguments: jax.tree.map(lambda x: x[0], function(*arguments)), *arguments)

    latents, timesteps = jnp.broadcast_to(jnp.float32(0), shape), jnp.broadcast_to(jnp.float32(0), shape[:1])
    texts, moving = shapes_of(texts_of, cond), shapes_of(moving_of, cond, latents, timesteps)
    of_weights, with_weights = split(lambda params, rest: call(params, *rest), params, (texts, moving))
    weights = jax.eval_shape(of_weights, params)
    of_texts, with_texts = split(
        lambda known, moving: with_weights(known[0], known[1], (known[2], moving)), (params, weights, texts), moving
    )

    def prepare(params: Params, cond: Conditioning) -> Any:
        with _precision(definition):
            weights = of_weights(params)
            return weights, _map(lambda texts: of_texts((params, weights, texts)), texts_of(cond))

    def predict(params: Params, cond: Conditioning, prepared: Any, latents: Array, timesteps: Array) -> Array:
        weights, kept = prepared
        rows = (texts_of(cond), kept, moving_of(cond, latents, timesteps))
        with _precision(definition):
            output = _map(lambda row: with_texts((params, weights, row[0]), row[1], row[2]), rows)
        output = output.reshape(shape[0], *output.shape[2:]).astype(jnp.float32)
        combined: Array = (_wide(cond.weights.swapaxes(0, 1)) * output).sum(1)
        return combined

    return StagedUNet(prepare, predict)


def _map(function: Callable[[Any], Any], rows: Any) -> Any:
    """`lax.map`, without a loop where there is one turn."""
    if jax.tree.leaves(rows)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], rows)))
    return lax.map(function, rows)


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
