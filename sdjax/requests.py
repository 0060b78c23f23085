"""What a caller asks for, checked and with every default filled in, before anything is computed."""

import math
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from sdjax.canvas import Canvas, canvas, untouched
from sdjax.errors import RequestError
from sdjax.generation import DECODED_AT_ONCE
from sdjax.images import to_rgb
from sdjax.loading import Checkpoint, checked_loras
from sdjax.prompts import Reading, reading
from sdjax.schedulers import Schedule, begin_step, default_sampler, table

OUTPUTS = ("pil", "numpy", "latents")
MAX_SIDE = 2048
LAST_SEED = 2**64 - 1


class Settings(TypedDict, total=False):
    """The arguments of a `Pipeline` call, where they are described."""

    steps: int | None
    guidance_scale: float | None
    guidance_rescale: float
    sampler: str | None
    schedule: str | None
    eta: float | None
    seed: int | None
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


class ControlInput(NamedTuple):
    """What one ControlNet is to make of one picture.

    Attributes:
        model: its folder.
        image: the picture, in the colours that it was trained to read.
        scale: how much it says; 0 is nothing.
        start: the share of the steps, 0 to 1, before which it is silent.
        end: likewise, after which.
        guess: let it speak where there is a prompt alone, and the less the higher the resolution.
    """

    model: str | Path
    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False


class Steering(NamedTuple):
    """A checked `ControlInput`; `pixels` (height, width, 3) uint8 have the picture's size."""

    model: Path
    pixels: NDArray[np.uint8]
    scale: float
    start: float
    end: float
    guess: bool


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
        time_ids: SDXL's micro-conditioning without and with the prompt; cut to the length that the model reads.
        output: of `OUTPUTS`.
        settings: what was asked for, as written into the picture's metadata.
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
    time_ids: tuple[Mapping[str, tuple[float, ...]], ...]
    output: str
    settings: Mapping[str, Any]


def resolve(
    checkpoint: Checkpoint, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, given: Settings
) -> Request:
    """Check the arguments of a `Pipeline` call; `steps` and `guidance_scale` are filled in already.

    Raises:
        RequestError: an argument can't be honoured; the message says what was given and what is allowed.
        CheckpointError: an embedding can't be read, or was learned for another kind of model.
        TypeError: a prompt is not a string.
    """
    prompts = _prompts("prompt", prompt)
    negatives = _negatives(negative_prompt, len(prompts))
    count = _whole("num_images", given.get("num_images", 1), 1, None)
    rows = len(prompts) * count
    output = given.get("output", "pil")
    if output not in OUTPUTS:
        raise RequestError(f"output must be one of {', '.join(OUTPUTS)}, not {output!r}")
    guidance_scale = _finite("guidance_scale", given["guidance_scale"])
    seed = given.get("seed")
    seed = secrets.randbits(32) if seed is None else _whole("seed", seed, 0, LAST_SEED)
    canvases = _canvases(checkpoint, given, len(prompts))
    width, height = _size(checkpoint, given, canvases)
    shape = (height // _factor(checkpoint), width // _factor(checkpoint), _vae(checkpoint).latent_channels)
    strength = _share("strength", given.get("strength", 0.8)) if canvases else 1.0
    if canvases and strength == 0:
        canvases = [untouched(entry) for entry in canvases]
    steps, sampler, schedule = given["steps"], given.get("sampler"), given.get("schedule")
    sampler = default_sampler(checkpoint.scheduler) if sampler is None else sampler
    walk, first, stop = _walk(checkpoint, given, sampler, strength)
    how = reading(
        checkpoint,
        clip_skip=given.get("clip_skip"),
        embeddings=given.get("embeddings", ()),
        long_prompts=given.get("long_prompts", "truncate"),
    )
    loras = checked_loras(given.get("loras", ()))
    latents = given.get("latents")
    if given.get("denoising_start") is not None and latents is None:
        raise RequestError("denoising_start goes on from latents: give them, from a call with output='latents'")
    return Request(
        prompts=tuple(np.repeat(np.array(prompts, object), count)),
        negative_prompts=tuple(np.repeat(np.array(negatives, object), count)),
        reading=how,
        seeds=tuple((seed + i) % (LAST_SEED + 1) for i in range(rows)),
        steps=int(steps),  # type: ignore[arg-type]
        guidance_scale=guidance_scale,
        guidance_rescale=_share("guidance_rescale", given.get("guidance_rescale", 0.0)),
        table=walk,
        first_row=first,
        stop_row=stop,
        latent_shape=shape,
        latents=None if latents is None else _latents(latents, (rows, *shape)),
        resumes=given.get("denoising_start") is not None,
        canvases=tuple(entry for entry in canvases for _ in range(count)),
        repaints=given.get("mask") is not None,
        loras=loras,
        controls=_controls(given.get("control", ()), (width, height)),
        tile=_tile(checkpoint, given.get("tiling"), (width, height)),
        time_ids=_time_ids(given, (height, width)),
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
    )


def _walk(checkpoint: Checkpoint, given: Settings, sampler: str, strength: float) -> tuple[Schedule, int, int]:
    """The sampler's table, the row where this walk enters it, and the one where it leaves."""
    steps, schedule = given["steps"], given.get("schedule")
    if schedule == "ays" and checkpoint.definition.is_xl:
        schedule = "ays_xl"
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
    for name, share, default in (("denoising_start", start, 0), ("denoising_end", end, steps)):
        if share is None:
            bounds.append(default)
        else:
            bounds.append(int((times >= round(train_timesteps * (1 - _share(name, share)))).sum()))
    return bounds[0], bounds[1]


def _canvases(checkpoint: Checkpoint, given: Settings, prompts: int) -> list[Canvas]:
    """One canvas a prompt, or none."""
    images, masks = _each("image", given.get("image"), prompts), _each("mask", given.get("mask"), prompts)
    config = checkpoint.definition.unet_config
    channels = _vae(checkpoint).latent_channels
    if config.in_channels not in (channels, 2 * channels + 1):
        raise RequestError(
            f"{checkpoint.source} has a UNet of {config.in_channels} input channels; only {channels} (ordinary) and "
            f"{2 * channels + 1} (inpainting) are known"
        )
    if config.in_channels != channels and any(picture is None for picture in (*images, *masks)):
        raise RequestError(f"{checkpoint.source} is an inpainting checkpoint: give image= and mask=")
    padding = given.get("padding_mask_crop")
    if padding is not None:
        padding = _whole("padding_mask_crop", padding, 0, None)
    feather = _finite("feather", given.get("feather", 0.0))
    if feather < 0:
        raise RequestError(f"feather must be at least 0 pixels, not {feather:g}")
    if images[0] is None:
        for name in ("mask", "padding_mask_crop"):
            if given.get(name) is not None:
                raise RequestError(f"{name} needs a picture: give image=")
        return []
    if given.get("denoising_start") is not None:
        raise RequestError("give image= with strength=, or latents= with denoising_start=, not both")
    factor = _factor(checkpoint)
    sides = [given.get(name) for name in ("width", "height")]
    size = tuple(
        None if side is None else _side(n, side, factor) for n, side in zip(("width", "height"), sides, strict=True)
    )
    made = [
        canvas(
            image,
            mask,
            size=size,  # type: ignore[arg-type]
            multiple=factor,
            largest=MAX_SIDE,
            padding=padding if mask is not None else None,
            feather=feather,
        )
        for image, mask in zip(images, masks, strict=True)
    ]
    sizes = {entry.pixels.shape[:2] for entry in made}
    if len(sizes) > 1:
        raise RequestError(f"the pictures have {len(sizes)} sizes, and a batch has one: give width= and height=")
    if given.get("output") == "numpy" and len({entry.whole.shape for entry in made}) > 1:
        raise RequestError("pictures of different sizes do not make one array: take output='pil'")
    return made


def _each(name: str, value: Any, prompts: int) -> list[Any]:
    """One picture for all prompts, or a list with one for each."""
    if not isinstance(value, list | tuple):
        return [value] * prompts
    if len(value) == 1:
        return list(value) * prompts
    if len(value) != prompts:
        raise RequestError(f"{name} has {len(value)} pictures for {prompts} prompts: give one, or one for each")
    return list(value)


def _size(checkpoint: Checkpoint, given: Settings, canvases: Sequence[Canvas]) -> tuple[int, int]:
    """(width, height) in pixels."""
    if canvases:
        height, width = canvases[0].pixels.shape[:2]
        return width, height
    native = checkpoint.definition.unet_config.sample_size * _factor(checkpoint)
    width, height = (
        _side(name, native if (side := given.get(name)) is None else side, _factor(checkpoint))
        for name in ("width", "height")
    )
    return width, height


def _controls(given: Sequence[Any], size: tuple[int, int]) -> tuple[Steering, ...]:
    checked = []
    for i, entry in enumerate(given):
        name = f"control[{i}]"
        try:
            asked = ControlInput(*entry)
        except TypeError as error:
            raise RequestError(f"{name} must be (folder, image, scale[, start, end, guess]), not {entry!r}") from error
        image = asked.image
        start, end = _share(f"{name}.start", asked.start), _share(f"{name}.end", asked.end)
        if start >= end:
            raise RequestError(f"{name} speaks from {start:g} to {end:g} of the steps, which is never")
        pixels = to_rgb(image, name=f"{name}.image")
        if (pixels.shape[1], pixels.shape[0]) != size:
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
        scale = _finite(f"{name}.scale", asked.scale)
        checked.append(Steering(Path(asked.model), pixels, scale, start, end, bool(asked.guess)))
    return tuple(checked)


def _time_ids(given: Settings, size: tuple[int, int]) -> tuple[Mapping[str, tuple[float, ...]], ...]:
    original = _pair("original_size", given.get("original_size") or size)
    crop = _pair("crop", given.get("crop", (0, 0)))
    target = _pair("target_size", given.get("target_size") or size)
    scores = (
        _finite("negative_aesthetic_score", given.get("negative_aesthetic_score", 2.5)),
        _finite("aesthetic_score", given.get("aesthetic_score", 6.0)),
    )
    return tuple({"base": (*original, *crop, *target), "refiner": (*original, *crop, score)} for score in scores)


def _tile(checkpoint: Checkpoint, tiling: bool | None, size: tuple[int, int]) -> int | None:
    """The side of the autoencoder's tiles: that of a square of as many pixels as it may hold at one time."""
    if tiling is None:
        tiling = size[0] * size[1] > DECODED_AT_ONCE
        if tiling:
            warnings.warn(
                f"a picture of {size[0]}x{size[1]} is encoded and decoded in tiles, to save memory; "
                "tiling=True or False chooses without this warning",
                stacklevel=4,
            )
    return math.isqrt(DECODED_AT_ONCE) // _factor(checkpoint) if tiling else None


def _pair(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise RequestError(f"{name} must be a pair of numbers (height, width), not {value!r}")
    return _finite(name, value[0]), _finite(name, value[1])


def _vae(checkpoint: Checkpoint) -> Any:
    return checkpoint.definition.vae_config


def _factor(checkpoint: Checkpoint) -> int:
    factor: int = checkpoint.definition.vae_config.factor
    return factor


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


def _share(name: str, value: object) -> float:
    share = _finite(name, value)
    if not 0 <= share <= 1:
        raise RequestError(f"{name} must be a number from 0 to 1, not {value!r}")
    return share


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
