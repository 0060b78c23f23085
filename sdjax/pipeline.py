"""The facade: a checkpoint that draws pictures.

`Pipeline` turns what a person asks for into arrays and runs the pure functions of `sdjax.generation`, which are
exported here too.
"""

import html
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from sdjax import images
from sdjax.errors import NotFiniteError, RequestError
from sdjax.generation import (
    START_NOISE,
    Conditioning,
    Table,
    Text,
    decode,
    denoise,
    draw_noise,
    encode_prompt,
    seed_keys,
    stack_tables,
    start_state,
)
from sdjax.loading import Checkpoint, load, save_folder
from sdjax.models import AddedConditioning, Definition, Params
from sdjax.prompts import tokenize
from sdjax.requests import Request, resolve
from sdjax.variants import BUNDLED, VARIANTS

__all__ = [
    "Conditioning",
    "Output",
    "Pipeline",
    "Table",
    "Text",
    "decode",
    "denoise",
    "encode_prompt",
    "stack_tables",
    "start_state",
]

Progress: TypeAlias = Callable[[int, int], None]
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
STEPS, GUIDANCE_SCALE = 20, 7.5
"""Defaults for checkpoints that are not in the table of variants."""
REPORTS_EVERY = 0.2
"""Seconds between two reports of progress, about: the compiled loop is not left more often than that."""

_encode_prompt = jax.jit(encode_prompt, static_argnums=0)
_denoise = jax.jit(denoise, static_argnums=0, donate_argnums=3)
_decode = jax.jit(decode, static_argnums=0)
_start_noise = jax.jit(partial(draw_noise, index=START_NOISE), static_argnames="shape")
_start_state = jax.jit(start_state)


@dataclass(frozen=True)
class Output:
    """What a call drew.

    Attributes:
        images: a list of `PIL.Image`, or one array: float32 (batch, height, width, 3) in 0..1, or latents
            (batch, height / f, width / f, channels).
        seeds: of each image; the same call with one of them draws that image again.
        settings: what the call came to, with all defaults filled in.
    """

    images: Any
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]

    def _repr_html_(self) -> str:
        if not isinstance(self.images, list):
            return html.escape(repr(self))
        return images.to_html(self.images, [f"seed {seed}" for seed in self.seeds])


class Pipeline:
    """A checkpoint, ready to draw.

    Nothing in it changes after it is made, so any number of threads may call it. Compiled programs are shared by all
    pipelines of equal architecture: a new prompt, seed, sampler, step count or guidance value compiles nothing; another
    size, batch or dtype does, and so does guidance that crosses 1, up to which a batch needs no second half.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, name: str, steps: int = STEPS, guidance_scale: float = GUIDANCE_SCALE
    ) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.steps = steps
        self.guidance_scale = guidance_scale

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        dtype: DTypeLike | None = None,
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        prediction_type: str | None = None,
    ) -> "Pipeline":
        """Load a checkpoint.

        Args:
            model: None for the bundled model, a name of `sdjax models`, the id of a repository on the hub, a folder in
                diffusers layout, or a .safetensors file in the original layout.
            dtype: of parameters and arithmetic: float32, bfloat16 or float16. None is float32 on a CPU, else bfloat16.
            variant: of the weight files, such as "fp16"; None takes those without.
            revision: a branch, tag or commit of a repository.
            local_files_only: ask no network.
            prediction_type: what the network predicts ("epsilon", "v_prediction" or "sample"), over all that the
                checkpoint says; None goes by that. One file of SD 2 is taken for a v-model unless it says otherwise.

        Raises:
            CheckpointError: it can't be found or read; the message says what is missing.
        """
        named = VARIANTS.get(BUNDLED if model is None else str(model))
        known = named or next((row for row in VARIANTS.values() if row.source == str(model)), None)
        source = BUNDLED_FOLDER if named is VARIANTS[BUNDLED] else named.source if named else str(model)
        checkpoint = load(
            source,
            dtype=_dtype(dtype),
            variant=variant,
            revision=revision,
            local_files_only=local_files_only,
            prediction_type=prediction_type,
        )
        name = BUNDLED if model is None else str(model)
        if known is None:
            return cls(checkpoint, name=name)
        return cls(checkpoint, name=name, steps=known.steps, guidance_scale=known.guidance_scale)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in diffusers layout, which diffusers loads too. Parameters keep their dtype."""
        save_folder(self.checkpoint, Path(folder))

    @property
    def definition(self) -> Definition:
        """What is static: hand it to the pure functions, as a static argument where they are jitted."""
        return self.checkpoint.definition

    @property
    def params(self) -> Params:
        """All weights: {"unet": ..., "vae": ..., "text_encoder": ..., ...}, immutable."""
        return self.checkpoint.params

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        seed: int | None = None,
        width: int | None = None,
        height: int | None = None,
        num_images: int = 1,
        latents: ArrayLike | None = None,
        output: Literal["pil", "numpy", "latents"] = "pil",
        progress: Progress | bool | None = None,
    ) -> Output:
        """Draw.

        Args:
            prompt: one, or a list of them; "" is valid, and means no words.
            negative_prompt: what guidance leads away from; one for all, or one for each prompt.
            steps: of the sampler; None is the model's own count.
            guidance_scale: how far to go from the negative prompt towards the prompt; up to 1 there is no guidance.
            sampler: a name of `sdjax.schedulers.SAMPLERS`; None is the one of the model's config.
            schedule: spacing of the noise levels: None (the model's own), "karras", "exponential", "beta" or "ays".
            seed: of the first image, 0 to 2**64 - 1; the images after it take the seeds that follow. None draws one.
            width: in pixels, a multiple of the model's factor (8 in published ones); None is what it was trained on.
            height: likewise.
            num_images: for each prompt.
            latents: (batch, height / f, width / f, channels) start noise of unit variance, in place of the seeds'.
            output: "pil", "numpy" or "latents".
            progress: called as progress(done, total) in steps; True shows a bar.

        Raises:
            RequestError: an argument can't be honoured; the message says what is allowed.
            NotFiniteError: an image came out as NaN or infinity.
        """
        request = resolve(
            self.checkpoint,
            prompt,
            negative_prompt,
            steps=self.steps if steps is None else steps,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            sampler=sampler,
            schedule=schedule,
            seed=seed,
            width=width,
            height=height,
            num_images=num_images,
            latents=latents,
            output=output,
        )
        latents = self._denoised(request, progress)
        _check_finite(latents, request)
        if output == "latents":
            drawn: Any = np.asarray(latents)
        else:
            pictures = _decode(self.definition, self.params, latents)
            _check_finite(pictures, request)
            drawn = np.asarray(pictures) if output == "numpy" else images.to_pil(np.asarray(pictures))
        return Output(drawn, request.seeds, {"model": self.name, **request.settings})

    def _denoised(self, request: Request, progress: Progress | bool | None) -> Array:
        cond = self._conditioning(request)
        schedules = [request.table] * len(request.seeds)
        noise = _start_noise(cond.keys, shape=request.latent_shape) if request.latents is None else request.latents
        state = _start_state(np.array([schedule.init_noise for schedule in schedules], np.float32), noise)
        stacked = stack_tables(schedules, 2 * self.checkpoint.scheduler.num_train_timesteps)
        stacked = jax.device_put(stacked)
        with _reporting(progress) as report:
            for start, stop in _slices(request.table.step, report):
                state = _denoise(self.definition, self.params, cond, state, stacked, np.int32(start), np.int32(stop))
                if report is not None:
                    state.block_until_ready()
        final: Array = state[:, 0]
        return final

    def _conditioning(self, request: Request) -> Conditioning:
        batch = len(request.seeds)
        guided = request.guidance_scale > 1
        prompts: list[str | None] = [*request.negative_prompts, *request.prompts] if guided else [*request.prompts]
        words = [prompt or "" for prompt in prompts]
        ids = [
            tokenize(tokenizer, words).reshape(-1, batch, tokenizer.length) for tokenizer in self.checkpoint.tokenizers
        ]
        text = _encode_prompt(self.definition, self.params, ids)
        if self.checkpoint.configs["model_index"].get("force_zeros_for_empty_prompt", self.definition.is_xl):
            said = np.array([prompt is not None for prompt in prompts], np.float32).reshape(-1, batch)
            text = jax.tree.map(lambda x: x * said.reshape(*said.shape, *[1] * (x.ndim - 2)).astype(x.dtype), text)
        scale = request.guidance_scale
        weights = np.array([[1 - scale], [scale]] if guided else [[1.0]], np.float32).repeat(batch, axis=1)
        return Conditioning(
            context=text.context,
            weights=jnp.asarray(weights),
            keys=jnp.asarray(seed_keys(request.seeds)),
            extra=jnp.zeros((batch, *request.latent_shape[:2], 0), jnp.float32),
            added=None
            if text.pooled is None
            else AddedConditioning(text.pooled, self._time_ids(request, weights.shape)),
        )

    def _time_ids(self, request: Request, shape: tuple[int, ...]) -> Array:
        """SDXL's micro-conditioning: original height and width, crop's top and left, target height and width."""
        height, width = request.settings["height"], request.settings["width"]
        ids = np.array([height, width, 0, 0, height, width], np.float32)
        return jnp.asarray(np.broadcast_to(ids, (*shape, len(ids))))


def _dtype(given: DTypeLike | None) -> Any:
    allowed = ("float32", "bfloat16", "float16")
    if given is None:
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in allowed:
        raise RequestError(f"dtype must be {', '.join(allowed)} or None, not {given!r}")
    return dtype


def _check_finite(values: Array, request: Request) -> None:
    finite = np.asarray(jnp.isfinite(values).reshape(len(request.seeds), -1).all(axis=1))
    for index in np.flatnonzero(~finite):
        raise NotFiniteError(
            f"image {index} (seed {request.seeds[index]}) came out as NaN or infinity: the weights hold such numbers, "
            "or their values are too large for the dtype (bfloat16 and float32 reach further than float16)"
        )


@contextmanager
def _reporting(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """Give a function to report to, or None: progress=True draws a bar in a terminal or a notebook."""
    if progress is None or progress is False:
        yield None
    elif progress is not True:
        yield progress
    else:
        from tqdm.auto import tqdm

        with tqdm(unit="step") as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield report


def _slices(step_of_row: Any, report: Progress | None) -> Iterator[tuple[int, int]]:
    """Cut the loop at steps' ends, about as often as reports are wanted; whole where none are."""
    rows = len(step_of_row)
    ends = np.flatnonzero(np.diff(step_of_row, append=-1)) + 1
    if report is None:
        yield 0, rows
        return
    start, done, at_once = 0, 0, 1
    report(0, len(ends))
    while done < len(ends):
        began = time.monotonic()
        taken = min(at_once, len(ends) - done)
        done += taken
        yield start, int(ends[done - 1])
        start = int(ends[done - 1])
        report(done, len(ends))
        # The first slice also compiles, or waits for what was queued: it says nothing about the speed.
        each = (time.monotonic() - began) / taken
        at_once = 1 if done == 1 else max(1, int(REPORTS_EVERY / max(each, 1e-6)))
