"""What can be timed without a peer: each part of drawing, loading, and a new process up to its first picture.

`sdjax bench` times them for a checkpoint, and the benchmarks beside the package for models of any size.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from sdjax.devices import programs
from sdjax.errors import SdjaxError
from sdjax.generation import Text, Tokens, compiled
from sdjax.generation.batch import Conditioning, seed_keys, stack_tables, start_state
from sdjax.generation.guidance import stage_denoiser
from sdjax.models import Conditions, Definition, Params
from sdjax.pipeline import Pipeline
from sdjax.schedulers import SchedulerConfig, table

Result = TypeVar("Result")

PROMPT = "a red circle on a blue background"
TIMESTEP = 801.0


class Work(NamedTuple):
    """Something to time.

    run: does it once, and returns when it is done.
    notes: seconds of what is done once before, by name.
    """

    run: Callable[[], object]
    notes: Mapping[str, float]


class Inputs(NamedTuple):
    """What a model is given: random words, random latents, random encoded prompts for the UNet alone.

    tokens: for each text encoder, (guidance, batch, 1, length).
    cond: as from encoded prompts, (guidance, batch, tokens, channels) and so on.
    latents: (batch, height, width, channels) of unit variance.
    """

    tokens: list[Tokens]
    cond: Conditioning
    latents: Array


def random_inputs(
    definition: Definition,
    text_configs: Sequence[Mapping[str, Any]],
    *,
    size: tuple[int, int],
    batch: int,
    guidance_scale: float,
) -> Inputs:
    """Make inputs for all parts of a checkpoint; their values change no time.

    Args:
        definition: static.
        text_configs: the text encoders' config.json, in their order.
        size: of a picture, (width, height) in pixels.
        batch: pictures at once.
        guidance_scale: up to 1 the UNet is called with the prompt alone.
    """
    random = np.random.default_rng(0)
    config, factor = definition.denoiser_config, definition.vae_config.factor
    guided = guidance_scale > 1 and not config.embeds_guidance
    halves = [[1.0 - guidance_scale], [guidance_scale]] if guided else [[1.0]]
    rows = (len(halves), batch)
    width, height = (side // factor for side in size)
    channels = definition.vae_config.latent_channels

    def normal(*shape: int) -> Array:
        return jnp.asarray(random.standard_normal(shape, np.float32))

    length, last = text_configs[0]["max_position_embeddings"], text_configs[-1]
    text = Text(
        context=normal(*rows, length, config.context_channels).astype(definition.dtype),
        pooled=normal(*rows, last.get("projection_dim") or last["hidden_size"]),
    )
    sides = float(height * factor), float(width * factor)
    conditions = Conditions(guidance_scale, sides, (0.0, 0.0), sides, (2.5, 6.0))
    cond = Conditioning(
        context=text.context,
        weights=jnp.asarray(np.repeat(np.array(halves, np.float32), batch, axis=1)),
        keys=jnp.asarray(seed_keys(range(batch))),
        extra=jnp.zeros((batch, height, width, config.in_channels - channels), jnp.float32),
        added=definition.family.added(config, text, conditions),
    )
    tokens = [_words(text, random, rows) for text in text_configs]
    return Inputs(tokens, cond, normal(batch, height, width, channels))


def _words(text: Mapping[str, Any], random: np.random.Generator, rows: tuple[int, int]) -> Tokens:
    """Random words that fill their row, closed by the end token, which is the last of every published vocabulary."""
    end = text["vocab_size"] - 1
    ids: NDArray[np.int32] = random.integers(1, end, (*rows, 1, text["max_position_embeddings"]), dtype=np.int32)
    ids[..., -1] = end
    return Tokens(ids, np.ones(ids.shape, np.float32))


def text_encoder(definition: Definition, params: Params, inputs: Inputs) -> Work:
    """Prompts to hidden states."""
    return _ready(lambda: _encoded(definition, params, inputs))


def unet_step(definition: Definition, params: Params, inputs: Inputs) -> Work:
    """One denoising step, without what is computed once a picture, which a note has."""
    cond, latents = inputs.cond, inputs.latents
    batch = latents.shape[0]
    staged = stage_denoiser(definition, params, cond, latents.shape)
    index, timesteps = jnp.zeros(batch, jnp.int32), jnp.full(batch, TIMESTEP)
    # Both before anything runs, as in the one program that the loop is: what compiling takes for a while and what has
    # been prepared are not in memory at one time.
    prepare = programs.jit(staged.prepare).lower(params, cond).compile()
    shapes = jax.eval_shape(staged.prepare, params, cond)
    began = time.perf_counter()
    predict = programs.jit(staged.predict).lower(params, cond, shapes, index, latents, timesteps).compile()
    ready = time.perf_counter()
    prepared = _done(prepare(params, cond))
    notes = {"compile_seconds": ready - began, "once_a_picture_seconds": time.perf_counter() - ready}
    return Work(lambda: _done(predict(params, cond, prepared, index, latents, timesteps)), notes)


def vae_decode(definition: Definition, params: Params, inputs: Inputs, tile: int | None = None) -> Work:
    """Latents to pixels."""
    return _ready(lambda: compiled.decode(definition, params, inputs.latents, tile=tile))


def picture(
    definition: Definition, params: Params, inputs: Inputs, scheduler: SchedulerConfig, steps: int, sampler: str
) -> Work:
    """Prompts to pixels, with as many steps of a sampler."""
    batch = inputs.latents.shape[0]
    schedule = table(sampler, scheduler, steps)
    tables = jax.device_put(stack_tables([schedule] * batch, len(schedule.timesteps)))
    start, stop = np.zeros(batch, np.int32), np.full(batch, len(schedule.step), np.int32)
    scale = np.full(batch, schedule.init_noise, np.float32)

    def run() -> Array:
        text = _encoded(definition, params, inputs)
        cond = inputs.cond._replace(context=text.context)
        if text.pooled is not None and cond.added is not None:
            cond = cond._replace(added=cond.added._replace(text_embeds=text.pooled))
        state = start_state(scale, inputs.latents)
        state = compiled.denoise(definition, params, cond, state, tables, start, stop)
        return compiled.decode(definition, params, state[:, 0])

    return _ready(run)


def _encoded(definition: Definition, params: Params, inputs: Inputs) -> Text:
    no_skip = np.zeros(np.shape(inputs.tokens[0].ids)[:2], np.int32)
    return compiled.encode_prompt(definition, params, inputs.tokens, None, no_skip)


def _ready(function: Callable[[], Any]) -> Work:
    """Run it once, which compiles; XLA's part of that is noted."""

    def run() -> Any:
        return _done(function())

    with programs.watched() as seconds:
        run()
    return Work(run, {"compile_seconds": sum(seconds)})


def _done(computed: Result) -> Result:
    """Wait until arrays are there."""
    waited: Result = jax.block_until_ready(computed)  # type: ignore[no-untyped-call]
    return waited


def loading(model: str | Path | None, *, dtype: str | None = None, variant: str | None = None) -> Work:
    """A checkpoint from its files to the device. What was loaded before is let go first."""
    held: list[Any] = []

    def run() -> None:
        held.clear()
        gc.collect()  # a pipeline is part of a cycle
        held.append(Pipeline.from_pretrained(model, dtype=dtype, variant=variant))
        _done(held[0].params)

    return Work(run, {})


def first_picture(
    model: str | Path | None, *, steps: int | None, dtype: str, options: Sequence[str] = (), keeps_programs: bool
) -> Work:
    """A new process of `sdjax generate` up to its end.

    Args:
        model: as `--model` takes it; None is the bundled one.
        steps: of the sampler; None is the model's own number.
        dtype: of parameters and arithmetic.
        options: more of the command's options.
        keeps_programs: whether a run finds the compiled programs of the one before; else every run compiles.
    """
    kept = tempfile.TemporaryDirectory()

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            # Last, so that what is passed on can't undo it.
            environment = {**os.environ, "SDJAX_CACHE_DIR": kept.name if keeps_programs else folder}
            command = [sys.executable, "-m", "sdjax", "generate", PROMPT, "--seed", "0", "--dtype", dtype]
            command += [] if model is None else ["--model", str(model)]
            command += [] if steps is None else ["--steps", str(steps)]
            command += ["--quiet", "-o", str(Path(folder) / "out.png"), *options]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SdjaxError(f"`sdjax generate` failed: {done.stderr.strip()}")

    return Work(run, {})
