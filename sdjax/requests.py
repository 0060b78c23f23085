"""What a caller asks for, checked and with every default filled in, before anything is computed."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdjax.errors import RequestError
from sdjax.loading import Checkpoint, Embedding, load_embedding
from sdjax.prompts import LONG_PROMPTS, encoder_configs
from sdjax.schedulers import Schedule, default_sampler, table

OUTPUTS = ("pil", "numpy", "latents")
MAX_SIDE = 2048
LAST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Request:
    """One batch of pictures. Sequences have an entry for each picture.

    `negative_prompts` are None where guidance leads away from nothing in particular. `latents`, where given, are the
    start noise.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    table: Schedule
    latent_shape: tuple[int, int, int]
    latents: NDArray[np.float32] | None
    clip_skip: int
    embeddings: tuple[Embedding, ...]
    long_prompts: str
    output: str
    settings: Mapping[str, Any]


def resolve(
    checkpoint: Checkpoint,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    *,
    steps: int,
    guidance_scale: float,
    sampler: str | None,
    schedule: Any,
    seed: int | None,
    width: int | None,
    height: int | None,
    num_images: int,
    latents: ArrayLike | None,
    clip_skip: int | None,
    embeddings: Sequence[str | Path | tuple[str | Path, str]],
    long_prompts: str,
    output: str,
) -> Request:
    """Check the arguments of a `Pipeline` call; they are described there.

    Raises:
        RequestError: an argument can't be honoured; the message says what was given and what is allowed.
        TypeError: a prompt is not a string.
    """
    prompts = _prompts("prompt", prompt)
    negatives = _negatives(negative_prompt, len(prompts))
    count = _whole("num_images", num_images, 1, None)
    if output not in OUTPUTS:
        raise RequestError(f"output must be one of {', '.join(OUTPUTS)}, not {output!r}")
    guidance_scale = _finite("guidance_scale", guidance_scale)
    config = checkpoint.definition.unet_config
    vae = checkpoint.definition.vae_config
    if config.in_channels != vae.latent_channels:
        raise RequestError(
            f"{checkpoint.source} is an inpainting checkpoint ({config.in_channels} input channels): it needs a "
            "picture and a mask"
        )
    native = config.sample_size * vae.factor
    height, width = (
        _side(name, native if side is None else side, vae.factor)
        for name, side in (("height", height), ("width", width))
    )
    shape = (height // vae.factor, width // vae.factor, vae.latent_channels)
    rows = len(prompts) * count
    sampler = default_sampler(checkpoint.scheduler) if sampler is None else sampler
    try:
        rows_of_table = table(sampler, checkpoint.scheduler, steps, schedule=schedule)
    except ValueError as error:
        raise RequestError(str(error)) from error
    encoders = encoder_configs(checkpoint)
    if clip_skip is not None:
        clip_skip = _whole("clip_skip", clip_skip, 1, min(encoder.num_hidden_layers for encoder in encoders) - 1)
    if long_prompts not in LONG_PROMPTS:
        raise RequestError(f"long_prompts must be one of {', '.join(LONG_PROMPTS)}, not {long_prompts!r}")
    learned = _embeddings(embeddings, [encoder.hidden_size for encoder in encoders])
    first = secrets.randbits(32) if seed is None else _whole("seed", seed, 0, LAST_SEED)
    return Request(
        prompts=tuple(np.repeat(np.array(prompts, object), count)),
        negative_prompts=tuple(np.repeat(np.array(negatives, object), count)),
        seeds=tuple((first + i) % (LAST_SEED + 1) for i in range(rows)),
        steps=int(steps),
        guidance_scale=guidance_scale,
        table=rows_of_table,
        latent_shape=shape,
        latents=None if latents is None else _latents(latents, (rows, *shape)),
        clip_skip=clip_skip or 0,
        embeddings=learned,
        long_prompts=long_prompts,
        output=output,
        settings=MappingProxyType(
            {
                "steps": int(steps),
                "sampler": sampler,
                "schedule": schedule,
                "guidance_scale": guidance_scale,
                "width": width,
                "height": height,
                "clip_skip": clip_skip,
                "long_prompts": long_prompts,
                "embeddings": [embedding.name for embedding in learned],
            }
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


def _embeddings(given: object, widths: Sequence[int]) -> tuple[Embedding, ...]:
    if isinstance(given, str | Path) or not isinstance(given, Sequence):
        raise RequestError(f"embeddings must be a list of files or of (file, name) pairs, not {given!r}")
    learned = []
    for i, entry in enumerate(given):
        source, name = (entry, None) if isinstance(entry, str | Path) else _pair(f"embeddings[{i}]", entry)
        learned.append(load_embedding(source, name, widths=widths))
    return tuple(learned)


def _pair(name: str, given: object) -> tuple[str | Path, str]:
    if isinstance(given, Sequence) and len(given) == 2:
        file, word = given
        if isinstance(file, str | Path) and isinstance(word, str):
            return file, word
    raise RequestError(f"{name} must be a file or a (file, name) pair, not {given!r}")


def _side(name: str, value: object, factor: int) -> int:
    side = _whole(name, value, factor, MAX_SIDE)
    if side % factor:
        low = side - side % factor
        raise RequestError(f"{name} must be a multiple of {factor}, not {side}: {low} and {low + factor} are nearest")
    return side


def _latents(given: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    latents = np.asarray(given, np.float32)
    if latents.shape != shape:
        raise RequestError(f"latents must have shape {shape} (batch, height, width, channels), not {latents.shape}")
    if not np.isfinite(latents).all():
        raise RequestError("latents hold NaN or infinity")
    return latents


def _finite(name: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"{name} must be a finite number, not {value!r}")
    return number


def _whole(name: str, value: object, least: int, most: int | None) -> int:
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise RequestError(f"{name} must be a whole number {allowed}, not {value!r}")
    number: int = value.__index__()
    if number < least or (most is not None and number > most):
        raise RequestError(f"{name} must be a whole number {allowed}, not {number}")
    return number
