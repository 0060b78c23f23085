"""The facade: a checkpoint that draws pictures.

`Pipeline` turns what a person asks for into arrays and runs the pure functions of `sdjax.generation`, which are
exported here too.
"""

import html
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import Unpack

from sdjax import images
from sdjax.argument_names import OF_A_CALL, OF_LOADING, refuse
from sdjax.canvas import pasted
from sdjax.devices.sharding import check_mesh, guidance_axis, placer
from sdjax.devices.target import local_target
from sdjax.errors import NotFiniteError, PromptWarning, RequestError
from sdjax.generation import Text, Tokens, compiled, decode, denoise, encode, encode_prompt
from sdjax.generation.batch import Batch, Conditioning, Control, Known, Table, put_row, stack_tables, start_state
from sdjax.inputs import ControlInput
from sdjax.loading import Card, Checkpoint, Part, as_part, load, lora_merger, save_folder
from sdjax.loading.weights import Place
from sdjax.models import Definition, Family, Params, is_quantised
from sdjax.models.quantised import is_large_weight, quantise_weight
from sdjax.preparing import Drawing, Weights, prepare, with_controlnets
from sdjax.requests import Request, Seed, Settings, resolve
from sdjax.variants import BUNDLED, BUNDLED_FOLDER, VARIANTS

__all__ = [
    "BUNDLED_FOLDER",
    "Batch",
    "Conditioning",
    "Control",
    "ControlInput",
    "Drawing",
    "Known",
    "Output",
    "Pipeline",
    "Request",
    "Table",
    "Text",
    "Tokens",
    "Weights",
    "decode",
    "denoise",
    "encode",
    "encode_prompt",
    "put_row",
    "stack_tables",
    "start_state",
]

Progress: TypeAlias = Callable[[int, int], None]
STEPS, GUIDANCE_SCALE = 20, 7.5
"""Defaults for checkpoints that are not in the table of variants."""
LOADING = (
    *("model", "dtype", "weights", "mesh", "variant", "revision", "local_files_only"),
    *("prediction_type", "vae"),
)
"""The arguments of `Pipeline.from_pretrained`."""
REPORTS_EVERY = 0.2
"""Seconds between two reports of progress, about: the compiled loop is not left more often than that."""


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
    size or dtype does, and so does guidance that crosses 1, up to which a batch needs no second half. On a CPU each
    picture of a batch is a call of its own, beside the others; elsewhere another size of batch compiles, too.
    """

    def __init__(self, checkpoint: Checkpoint, *, name: str) -> None:
        self.checkpoint = checkpoint
        self.name = name
        card = checkpoint.card
        self.steps = STEPS if card.steps is None else card.steps
        self.guidance_scale = GUIDANCE_SCALE if card.guidance_scale is None else card.guidance_scale
        self._merged = lora_merger(checkpoint.params)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        dtype: DTypeLike | None = None,
        weights: str | None = None,
        mesh: Mesh | None = None,
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        prediction_type: str | None = None,
        vae: str | Path | Part | None = None,
        **unknown: Any,
    ) -> "Pipeline":
        """Load a checkpoint.

        Args:
            model: None for the bundled model, a name of `sdjax models`, the id of a repository on the hub, a folder in
                diffusers layout, or a .safetensors file in the original layout.
            dtype: of parameters and arithmetic: float32, bfloat16 or float16. None is float32 on a CPU, else bfloat16.
            weights: "int8" stores the large kernels of denoiser and text encoders so, in a quarter of float32's memory:
                `sdjax.models.quantise`. It takes no LoRAs, no mesh, and can't be saved. None stores them in `dtype`.
            mesh: devices to draw on together, as `sdjax.sharding.make_mesh` arranges them; None is one device.
            variant: of the weight files, such as "fp16"; None takes those without.
            revision: a branch, tag or commit of a repository.
            local_files_only: ask no network.
            prediction_type: what the network predicts ("epsilon", "v_prediction" or "sample"), over all that the
                checkpoint says; None goes by that. One file of SD 2 is taken for a v-model unless it says otherwise.
            vae: an autoencoder in the place of the checkpoint's own: a folder, a .safetensors file, a hub id, or a
                `sdjax.Part`, which also has the variant and the revision. None takes the checkpoint's.

        Raises:
            CheckpointError: it can't be found or read; the message says what is missing.
            RequestError: an argument isn't one of those.
            TypeError: there is no such argument; the message has the one that was probably meant.
        """
        refuse(unknown, LOADING, OF_LOADING, "from_pretrained")
        if weights not in (None, "int8"):
            raise RequestError(f"weights must be 'int8' or None, not {weights!r}")
        if weights is not None and mesh is not None:
            raise RequestError("weights='int8' are for a single device: leave it out, or mesh")
        named = VARIANTS.get(BUNDLED if model is None else str(model))
        known = named or next((row for row in VARIANTS.values() if row.source == str(model)), None)
        source = BUNDLED_FOLDER if named is VARIANTS[BUNDLED] else named.source if named else str(model)
        checkpoint = load(
            source,
            dtype=checked_dtype(dtype),
            variant=variant,
            revision=revision,
            local_files_only=local_files_only,
            prediction_type=prediction_type,
            vae=None if vae is None else _vae(vae, local_files_only),
            placing=_placing(weights, mesh),
        )
        name = BUNDLED if model is None else str(model)
        if known is not None:
            card = checkpoint.card.over(Card(known.note, known.steps, known.guidance_scale))
            checkpoint = replace(checkpoint, card=card)
        return cls(checkpoint, name=name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in diffusers layout, which diffusers loads too, and a `card.json` with the model's defaults.

        Parameters keep their dtype.
        """
        defaults = Card(steps=self.steps, guidance_scale=self.guidance_scale)
        save_folder(replace(self.checkpoint, card=self.checkpoint.card.over(defaults)), Path(folder))

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        width, height = self.definition.native_size
        stored = "int8 weights" if is_quantised(self.params) else f"{sum(leaf.size for leaf in leaves):,} parameters"
        devices = ", ".join(sorted({str(device) for leaf in leaves for device in leaf.devices()}))
        return f"Pipeline({self.name!r}, {width}x{height} pixels, {self.definition.dtype}, {stored} on {devices})"

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
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        schedule: str | None = None,
        eta: float | None = None,
        seed: Seed = None,
        width: int | None = None,
        height: int | None = None,
        num_images: int = 1,
        latents: ArrayLike | None = None,
        image: Any = None,
        mask: Any = None,
        strength: float = 0.8,
        padding_mask_crop: int | None = None,
        feather: float = 0.0,
        loras: Sequence[tuple[str | Path, float]] = (),
        lora_dir: str | Path | None = None,
        control: Sequence[ControlInput | tuple[Any, ...]] = (),
        tiling: bool | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        embeddings: Sequence[str | Path | tuple[str | Path, str]] = (),
        long_prompts: Literal["truncate", "chunk"] = "truncate",
        output: Literal["pil", "numpy", "latents"] = "pil",
        progress: Progress | bool | None = None,
        **unknown: Any,
    ) -> Output:
        """Draw.

        Args:
            prompt: one, or a list of them; "" is valid, and means no words. `(words)`, `(words:1.3)` and `[words]`
                weigh words, BREAK begins a chunk: `sdjax.prompts.grammar` has the rules. Plain text stays as it is,
                and so does the syntax of other tools, with a warning that names it.
            negative_prompt: what guidance leads away from; one for all, or one for each prompt.
            steps: of the sampler; None is the model's own count.
            guidance_scale: how far to go from the negative prompt towards the prompt; up to 1 there is no guidance.
            guidance_rescale: 0 to 1, how far to undo the contrast that guidance adds (arXiv 2305.08891).
            sampler: a name of `sdjax.schedulers.SAMPLERS`; None is the one of the model's config.
            schedule: spacing of the noise levels: None (the model's own), "karras", "exponential", "beta" or "ays".
            eta: share of fresh noise in "ddim" and "tcd", 0 to 1; None is the sampler's own.
            seed: of the first image, 0 to 2**64 - 1, or a key of `jax.random.key`; the images after it take the seeds
                that follow. A list has one for each prompt, or one for each image. None draws one.
            width: in pixels, a multiple of the model's factor (8 in published ones); None is the picture's with
                `image`, else what the model was trained on.
            height: likewise.
            num_images: for each prompt.
            latents: (batch, height / f, width / f, channels) start noise of unit variance, in place of the seeds'.
            image: a picture to start from: a `PIL.Image` or an array, or a list with one for each prompt. How it is
                read: `sdjax.images.to_rgb`; how it is fitted to the size: `sdjax.canvas.canvas`.
            mask: what to repaint of it, white on black (`sdjax.images.to_mask`); pixels where it is black stay as
                they are, to the byte.
            strength: how much of the image to paint anew: 1 starts from noise, 0 gives the image back. The last
                `int(steps * strength)` steps are run; a strength above 0 that leaves none is refused.
            padding_mask_crop: work on the masked region alone, at the whole size, with this many pixels around it.
            feather: pixels over which the repainted part fades in, inside the mask.
            loras: adapters, each (file or folder, weight); their order does not matter.
            lora_dir: the folder in which `<lora:name:0.8>` of a prompt is looked for; it is taken out of the prompt
                in any case. Without a folder, or where it has no such adapter, there is a warning.
            control: ControlNets: (folder, file or hub id, image, scale), or a `ControlInput`, for each.
            tiling: encode and decode in tiles, which takes less memory and differs a little. None does so, with a
                warning, beyond 1024 x 1024 pixels.
            denoising_start: go on from `latents` of another model, which left off there (0 to 1, a share of the way).
            denoising_end: leave off there, for another model to go on: with output="latents".
            original_size: SDXL: (height, width) that the picture is to look like it was taken at.
            crop: SDXL: (top, left) of the crop that it is to look like.
            target_size: SDXL: (height, width) that it is to look like it was made for.
            aesthetic_score: SDXL's refiner: how well liked it is to look.
            negative_aesthetic_score: likewise, of what guidance leads away from.
            clip_skip: layers of the text encoder that the prompt does without, counted as diffusers counts: 1 is what
                AUTOMATIC1111 and the parameters in a PNG call 2. As in diffusers, SDXL counts from the penultimate
                layer, and the negative prompt keeps all layers.
            embeddings: learned words (textual inversion): .safetensors files, or (file, name) to choose the word.
            long_prompts: what becomes of words beyond an encoder's length: "truncate" cuts them, with a warning that
                shows them; "chunk" encodes them in chunks of that length. Each number of chunks compiles once.
            output: "pil", "numpy" or "latents".
            progress: called as progress(done, total) in steps; True shows a bar.

        Raises:
            RequestError: an argument can't be honoured; the message says what is allowed.
            CheckpointError: an adapter, a ControlNet or an embedding can't be read, or is for another kind of model.
            NotFiniteError: an image came out as NaN or infinity.
            TypeError: there is no such argument; the message has the one that was probably meant.

        Warns:
            PromptWarning: something was replaced, cut or ignored, or the model does not know it; once for each.
        """
        refuse(unknown, [*Settings.__annotations__, "progress"], OF_A_CALL, "a call")
        request = self.resolve(
            prompt,
            negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            sampler=sampler,
            schedule=schedule,
            eta=eta,
            seed=seed,
            width=width,
            height=height,
            num_images=num_images,
            latents=latents,
            image=image,
            mask=mask,
            strength=strength,
            padding_mask_crop=padding_mask_crop,
            feather=feather,
            loras=loras,
            lora_dir=lora_dir,
            control=control,
            tiling=tiling,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            original_size=original_size,
            crop=crop,
            target_size=target_size,
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
            clip_skip=clip_skip,
            embeddings=embeddings,
            long_prompts=long_prompts,
            output=output,
        )
        for message in request.warnings:
            warnings.warn(message, PromptWarning, stacklevel=2)
        latents = self._denoised(request, progress)
        if output == "pil":
            drawn: Any = self.finish(request, latents)
        elif output == "numpy":
            drawn = np.stack(self._pictures(request, latents))
        else:
            drawn = _finite(latents, request)
        return Output(drawn, request.seeds, {"model": self.name, **request.settings})

    def resolve(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        **settings: Unpack[Settings],
    ) -> Request:
        """Check what a call would be asked for, and fill in its defaults; nothing is computed.

        What a call would warn of is in the request's `warnings`.

        Raises:
            RequestError: an argument can't be honoured; the message says what is allowed.
        """
        steps, guidance_scale = settings.get("steps"), settings.get("guidance_scale")
        filled: Settings = {
            **settings,
            "steps": self.steps if steps is None else steps,
            "guidance_scale": self.guidance_scale if guidance_scale is None else guidance_scale,
        }
        return resolve(self.checkpoint, prompt, negative_prompt, filled)

    def weights(self, request: Request) -> Weights:
        """Read the adapters and ControlNets that a request names, as their files are now.

        Raises:
            CheckpointError: a file can't be read, or is for another kind of model.
        """
        merged = self._merged(request.loras)
        return with_controlnets(Weights(self.definition, merged.params, merged.key), request.controls)

    def prepare(self, request: Request, weights: Weights | None = None) -> Drawing:
        """Make all that the loop needs to draw a request, a row of the batch for each picture.

        Args:
            request: of `resolve`.
            weights: of another request with the same adapters and ControlNets, for both to be drawn with the same; None
                reads them now. Files that are replaced afterwards change nothing of the drawing.
        """
        return prepare(self.checkpoint, self.weights(request) if weights is None else weights, request)

    def denoise(self, drawing: Drawing, start: ArrayLike, stop: ArrayLike) -> Drawing:
        """Walk each row of a batch through rows `start` to `stop`, (batch,) int32, of its table; see `denoise`.

        Args:
            drawing: its state is donated: use the one that comes back.
            start: of each row; one whose `start` is not before its `stop` stands still.
            stop: likewise.

        Returns:
            The drawing after it.
        """
        batch = drawing.batch
        axis = guidance_axis(drawing.params, len(batch.cond.weights))
        bounds = np.asarray(start), np.asarray(stop)
        arrays = batch.cond, batch.state, batch.table, *bounds
        state = compiled.denoise(drawing.definition, drawing.params, *arrays, guidance_axis=axis)
        return drawing._replace(batch=batch._replace(state=state))

    def finish(self, request: Request, latents: ArrayLike) -> list[Image.Image]:
        """Decode a request's final latents, one row a picture, and paste what its mask repaints into the input.

        Raises:
            NotFiniteError: a picture came out as NaN or infinity.
        """
        return [images.to_pil(picture[None])[0] for picture in self._pictures(request, latents)]

    def _pictures(self, request: Request, latents: ArrayLike) -> list[Any]:
        _finite(latents, request)
        pictures = _finite(compiled.decode(self.definition, self.params, latents, tile=request.tile), request)
        if not request.canvases:
            return list(pictures)
        return [pasted(canvas, picture) for canvas, picture in zip(request.canvases, pictures, strict=True)]

    def _denoised(self, request: Request, progress: Progress | bool | None) -> Array:
        drawing = self.prepare(request)
        rows = np.ones(len(request.seeds), np.int32)
        with _reporting(progress) as report:
            for start, stop in _slices(request.table.step, request.first_row, request.stop_row, report):
                drawing = self.denoise(drawing, start * rows, stop * rows)
                if report is not None:
                    drawing.batch.state.block_until_ready()
        return drawing.batch.state[:, 0]


def _vae(given: str | Path | Part, local_files_only: bool) -> Part:
    part = as_part(given, "vae")
    return part._replace(local_files_only=local_files_only or part.local_files_only)


def _placing(weights: str | None, mesh: Mesh | None) -> Callable[[Family], Place] | None:
    """Choose how parameters are placed: as int8, over a mesh, or on the default device (None)."""
    if weights is not None:
        return lambda _: _as_int8
    if mesh is None:
        return None
    checked = check_mesh(mesh)
    return lambda family: placer(checked, family.splits)


def _as_int8(path: Sequence[str | int], array: NDArray[Any]) -> Any:
    """Put a parameter on the default device, a large weight as int8."""
    return quantise_weight(array) if is_large_weight(path, array.shape) else jax.device_put(array)


def checked_dtype(given: DTypeLike | None) -> Any:
    """The dtype of parameters and arithmetic that is asked for, or this backend's own.

    Raises:
        RequestError: it is none of those that there are.
    """
    allowed = ("float32", "bfloat16", "float16")
    if given is None:
        return jnp.dtype("float32" if local_target().platform == "cpu" else "bfloat16")
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in allowed:
        raise RequestError(f"dtype must be {', '.join(allowed)} or None, not {given!r}")
    return dtype


def _finite(values: ArrayLike, request: Request) -> NDArray[Any]:
    """The values, off the device, where a look at them has nothing to compile."""
    values = np.asarray(values)
    for index in np.flatnonzero(~np.isfinite(values).reshape(len(request.seeds), -1).all(axis=1)):
        raise NotFiniteError(
            f"image {index} (seed {request.seeds[index]}) came out as NaN or infinity: the weights hold such numbers, "
            "or their values are too large for the dtype (bfloat16 and float32 reach further than float16)"
        )
    return values


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


def _slices(step: Any, first: int, stop: int, report: Progress | None) -> Iterator[tuple[int, int]]:
    """Cut the walk at steps' ends, about as often as reports are wanted; whole where none are."""
    if report is None or first == stop:
        yield first, stop
        return
    ends = first + np.flatnonzero(np.diff(step[first:stop], append=-1)) + 1
    start, done, at_once = first, 0, 1
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
