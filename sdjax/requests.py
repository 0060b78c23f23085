"""What a caller asks for, checked and with every default filled in, before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdjax.argument_names import OF_A_CALL, refuse
from sdjax.canvas import Canvas, untouched
from sdjax.checks import finite, pair, share, whole
from sdjax.errors import RequestError, Warn
from sdjax.ignored import ignored_arguments
from sdjax.inputs import Steering, canvases_of, controls_of, size_of, tile_of
from sdjax.loading import Checkpoint, checked_loras, find_adapter, refuse_int8
from sdjax.models import Conditions
from sdjax.prompts import LoraTag, Reading, check_prompts, reading, take_tags
from sdjax.schedulers import Schedule, begin_step, default_sampler, replaced_sampler, table
from sdjax.seeds import seeds_of

OUTPUTS = ("pil", "numpy", "latents")
Seed: TypeAlias = int | Sequence[int] | ArrayLike | None
"""See `sdjax.seeds.seeds_of`."""


class Settings(TypedDict, total=False):
    """The arguments of a `Pipeline` call, where they are described."""

    steps: int | None
    guidance_scale: float | None
    guidance_rescale: float
    sampler: str | None
    schedule: str | None
    eta: float | None
    seed: Seed
    width: int | None
    height: int | None
    num_images: int
    latents: ArrayLike | None
    image: Any
    mask: Any
    strength: float
    padding_mask_crop: int | None
    feather: float
    loras: Sequence[tuple[str | Path, float]]
    lora_dir: str | Path | None
    control: Sequence[Any]
    tiling: bool | None
    denoising_start: float | None
    denoising_end: float | None
    original_size: tuple[int, int] | None
    crop: tuple[int, int]
    target_size: tuple[int, int] | None
    aesthetic_score: float
    negative_aesthetic_score: float
    clip_skip: int | None
    embeddings: Sequence[Any]
    long_prompts: str
    output: str


@dataclass(frozen=True)
class Request:
    """One batch of pictures. Sequences have an entry for each picture.

    Attributes:
        prompts: what to draw.
        negative_prompts: None where guidance leads away from nothing in particular.
        reading: how both are read.
        seeds: where each picture's noise comes from.
        steps: of a whole walk.
        guidance_scale: how far to go from the negative prompt towards the prompt.
        guidance_rescale: share, 0 to 1, of bringing the guided output back to the spread of the prompted one.
        table: the sampler.
        first_row: where the walk enters the table.
        stop_row: where it leaves it.
        latent_shape: (height, width, channels).
        latents: start noise, where it is given; already noisy latents where `resumes`.
        resumes: whether the walk goes on from `latents` instead of starting from noise.
        canvases: what the pictures start from; empty where they start from noise.
        repaints: whether the canvases have masks.
        loras: adapters and their weights.
        controls: what ControlNets see.
        tile: side in latents of the autoencoder's tiles, or None where it takes a picture whole.
        conditions: of the denoiser, beside its text.
        output: of `OUTPUTS`.
        settings: what was asked for, as written into the picture's metadata.
        warnings: what was replaced, cut or ignored, or what the model does not know, a line each.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]
    reading: Reading
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    guidance_rescale: float
    table: Schedule
    first_row: int
    stop_row: int
    latent_shape: tuple[int, int, int]
    latents: NDArray[np.float32] | None
    resumes: bool
    canvases: tuple[Canvas, ...]
    repaints: bool
    loras: tuple[tuple[Path, float], ...]
    controls: tuple[Steering, ...]
    tile: int | None
    conditions: Conditions
    output: str
    settings: Mapping[str, Any]
    warnings: tuple[str, ...]


def resolve(
    checkpoint: Checkpoint, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, given: Settings
) -> Request:
    """Check the arguments of a `Pipeline` call; `steps` and `guidance_scale` are filled in already.

    Raises:
        RequestError: an argument can't be honoured; the message says what was given and what is allowed.
        CheckpointError: an embedding can't be read, or was learned for another kind of model.
        TypeError: a prompt is not a string, or there is no such argument.
    """
    refuse(given.keys() - Settings.__annotations__.keys(), Settings.__annotations__, OF_A_CALL, "a call")
    notes: list[str] = []
    prompts = _prompts("prompt", prompt)
    negatives = _negatives(negative_prompt, len(prompts))
    prompts, negatives, tagged = _without_tags(prompts, negatives, given.get("lora_dir"), warn=notes.append)
    count = whole("num_images", given.get("num_images", 1), 1, None)
    rows = len(prompts) * count
    output = given.get("output", "pil")
    if output not in OUTPUTS:
        raise RequestError(f"output must be one of {', '.join(OUTPUTS)}, not {output!r}")
    guidance_scale = finite("guidance_scale", given["guidance_scale"])
    definition = checkpoint.definition
    notes += ignored_arguments(definition, {**given, "negative_prompt": negatives}, guidance_scale)
    canvases = canvases_of(definition, given, len(prompts), warn=notes.append)
    width, height = size_of(definition, given, canvases)
    factor = definition.vae_config.factor
    shape = (height // factor, width // factor, definition.vae_config.latent_channels)
    strength = share("strength", given.get("strength", 0.8)) if canvases else 1.0
    if canvases and strength == 0:
        canvases = [untouched(entry) for entry in canvases]
    steps, sampler, schedule = given["steps"], given.get("sampler"), given.get("schedule")
    if sampler is None:
        sampler = default_sampler(checkpoint.scheduler)
        if replaced := replaced_sampler(checkpoint.scheduler):
            notes.append(f"the model's scheduler config names {replaced}, which is not supported: {sampler} is used")
    walk, first, stop = _walk(checkpoint, given, sampler, strength)
    loras = (*checked_loras(given.get("loras", ())), *tagged)
    if loras:
        refuse_int8(checkpoint.params)
    how = reading(
        checkpoint,
        loras=loras,
        clip_skip=given.get("clip_skip"),
        embeddings=given.get("embeddings", ()),
        long_prompts=given.get("long_prompts", "truncate"),
    )
    guided = guidance_scale > 1
    check_prompts(checkpoint, [*prompts, *(text for text in negatives if text and guided)], how, warn=notes.append)
    latents = given.get("latents")
    if given.get("denoising_start") is not None and latents is None:
        raise RequestError("denoising_start goes on from latents: give them, from a call with output='latents'")
    return Request(
        prompts=tuple(np.repeat(np.array(prompts, object), count)),
        negative_prompts=tuple(np.repeat(np.array(negatives, object), count)),
        reading=how,
        seeds=seeds_of(given.get("seed"), len(prompts), count),
        steps=int(steps),  # type: ignore[arg-type]
        guidance_scale=guidance_scale,
        guidance_rescale=share("guidance_rescale", given.get("guidance_rescale", 0.0)),
        table=walk,
        first_row=first,
        stop_row=stop,
        latent_shape=shape,
        latents=None if latents is None else _latents(latents, (rows, *shape)),
        resumes=given.get("denoising_start") is not None,
        canvases=tuple(entry for entry in canvases for _ in range(count)),
        repaints=given.get("mask") is not None,
        loras=loras,
        controls=controls_of(given.get("control", ()), (width, height), warn=notes.append),
        tile=tile_of(definition, given.get("tiling"), (width, height), warn=notes.append),
        conditions=_conditions(given, guidance_scale, (height, width)),
        output=output,
        settings=MappingProxyType(
            {
                "steps": int(steps),  # type: ignore[arg-type]
                "sampler": sampler,
                "schedule": schedule,
                "guidance_scale": guidance_scale,
                "width": width,
                "height": height,
                "strength": strength if canvases else None,
                "loras": [f"{path.stem}:{weight:g}" for path, weight in loras] or None,
                "clip_skip": how.clip_skip,
                "embeddings": [embedding.name for embedding in how.embeddings],
                "long_prompts": how.long_prompts,
            }
        ),
        warnings=tuple(dict.fromkeys(notes)),
    )


def _without_tags(
    prompts: Sequence[str], negatives: Sequence[str | None], folder: object, *, warn: Warn
) -> tuple[list[str], list[str | None], tuple[tuple[Path, float], ...]]:
    """Take `<lora:...>` out of all prompts: what is left of them, and the adapters, which all prompts have in common.

    Raises:
        RequestError: prompts of one batch ask for different adapters, or `folder` is no path.
    """
    if not isinstance(folder, str | Path | None):
        raise RequestError(f"lora_dir must be the folder of adapters, not {folder!r}")
    texts, found = [], []
    for prompt in prompts:
        text, tags = take_tags(prompt, warn=warn)
        texts.append(text)
        found.append(tuple(pair for tag in tags for pair in _adapter(tag, folder, warn=warn)))
    if len({tuple(sorted(adapters)) for adapters in found}) > 1:
        raise RequestError("prompts of one call must have the same <lora:...>: weights are merged once for all of them")
    left = []
    for negative in negatives:
        text, tags = take_tags(negative or "", warn=warn)
        left.append(negative if negative is None else text)
        for tag in tags:
            warn(f"{tag.text} is left out: an adapter belongs in the prompt, not in the negative prompt")
    return texts, left, found[0]


def _adapter(tag: LoraTag, folder: str | Path | None, *, warn: Warn) -> list[tuple[Path, float]]:
    if folder is None:
        warn(f"{tag.text} is left out: there is no adapter folder (lora_dir, --lora-dir) to look for it in")
        return []
    try:
        return [(find_adapter(Path(folder), tag.name), tag.weight)]
    except RequestError as error:
        warn(f"{tag.text} is left out: {error}")
        return []


def _walk(checkpoint: Checkpoint, given: Settings, sampler: str, strength: float) -> tuple[Schedule, int, int]:
    """The sampler's table, the row where this walk enters it, and the one where it leaves."""
    steps, schedule = given["steps"], given.get("schedule")
    if schedule == "ays":
        schedule = checkpoint.definition.family.ays
    start, end = (given.get(name) for name in ("denoising_start", "denoising_end"))

    def made(begin: int) -> Schedule:
        return table(
            sampler,
            checkpoint.scheduler,
            steps,  # type: ignore[arg-type]
            schedule=schedule,  # type: ignore[arg-type]
            begin=begin,
            eta=given.get("eta"),
        )

    try:
        whole = made(0)
        first, stop = 0, len(whole.step)
        if strength == 0:
            return whole, stop, stop
        if strength < 1:
            begin = begin_step(int(steps), strength)  # type: ignore[arg-type]
            whole = made(begin)
            first = whole.first_row(begin)
        if start is not None or end is not None:
            first_step, stop_step = _part(whole, checkpoint.scheduler.num_train_timesteps, start, end)
            whole = made(first_step) if first_step else whole
            first, stop = max(first, whole.first_row(first_step)), whole.first_row(stop_step)
    except ValueError as error:
        raise RequestError(str(error)) from error
    if first >= stop:
        raise RequestError(f"denoising_start {start} to denoising_end {end} holds none of the {steps} steps")
    return whole, first, stop


def _part(walk: Schedule, train_timesteps: int, start: object, end: object) -> tuple[int, int]:
    """Steps between two shares of the noise's way, as diffusers cuts it: by the timesteps, not by counting steps."""
    steps = int(walk.step[-1]) + 1
    times = walk.timesteps[[walk.first_row(step) for step in range(steps)]]
    bounds = []
    for name, bound, default in (("denoising_start", start, 0), ("denoising_end", end, steps)):
        if bound is None:
            bounds.append(default)
        else:
            bounds.append(int((times >= round(train_timesteps * (1 - share(name, bound)))).sum()))
    return bounds[0], bounds[1]


def _conditions(given: Settings, guidance_scale: float, size: tuple[int, int]) -> Conditions:
    return Conditions(
        guidance_scale=guidance_scale,
        original_size=pair("original_size", given.get("original_size") or size),
        crop=pair("crop", given.get("crop", (0, 0))),
        target_size=pair("target_size", given.get("target_size") or size),
        aesthetic_scores=(
            finite("negative_aesthetic_score", given.get("negative_aesthetic_score", 2.5)),
            finite("aesthetic_score", given.get("aesthetic_score", 6.0)),
        ),
    )


def _prompts(name: str, given: object) -> list[str]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence):
        raise TypeError(f"{name} must be a string or a list of strings, not {given!r}")
    for i, entry in enumerate(given):
        if not isinstance(entry, str):
            raise TypeError(f"{name}[{i}] must be a string, not {entry!r}")
    if not given:
        raise RequestError(f"{name} is an empty list: it needs at least one string")
    return list(given)


def _negatives(given: object, count: int) -> list[str | None]:
    if given is None:
        return [None] * count
    negatives = _prompts("negative_prompt", given)
    if isinstance(given, str):
        negatives *= count
    if len(negatives) != count:
        raise RequestError(
            f"negative_prompt has {len(negatives)} entries for {count} prompts: give one, or one for each"
        )
    return list(negatives)


def _latents(given: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    latents = np.asarray(given, np.float32)
    if latents.shape != shape:
        raise RequestError(f"latents must have shape {shape} (batch, height, width, channels), not {latents.shape}")
    if not np.isfinite(latents).all():
        raise RequestError("latents hold NaN or infinity")
    return latents
