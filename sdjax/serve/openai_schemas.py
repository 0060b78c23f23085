"""What OpenAI's image clients send, and how it becomes a job.

Parameters that have no meaning for a diffusion model (`quality`, `style`, `moderation`, `input_fidelity`, `user`,
`safety_identifier`) are taken and change nothing; one that asks for something that can't be had is an error that names
it. Many clients send "" for what was left open: it is the same as no value.
"""

import base64
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
from PIL import Image, ImageOps
from pydantic import ConfigDict, Field, ValidationError

from sdjax.limits import JOB_IMAGES, LAST_SEED
from sdjax.serve.pictures import Given, write_picture
from sdjax.serve.problems import ProblemError, invalid, shown
from sdjax.serve.schemas import (
    WHOLE,
    Format,
    Guidance,
    ImageGeneration,
    ImageInpaint,
    ImageTransform,
    Name,
    Prompt,
    Sampler,
    Schedule,
    Steps,
    Strength,
    Strict,
    field_problem,
    job_request,
)
from sdjax.serve.served import ServedModel

MASKED_STRENGTH = 1.0
"""What a mask uncovers is drawn from nothing, as these clients expect; a picture without a mask keeps its outlines."""
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
_PARAMS: Mapping[str, str] = {
    "width": "size",
    "height": "size",
    "num_images": "n",
    "response": "output_format",
    "input_image": "image",
    "init_image": "image",
    "mask_image": "mask",
    "preview_every": "partial_images",
}
"""A job's fields, by what these clients call them."""

RANDOM = -1
"""A seed that other servers take for none."""
RandomSeed: TypeAlias = Annotated[int, Field(ge=RANDOM, le=LAST_SEED), WHOLE]
Quality: TypeAlias = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


def _allow_blanks(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        if name not in schema["required"]:
            field["anyOf"] = [*field["anyOf"], {"const": ""}]


class ImageParams(Strict):
    """What both routes take. `seed`, `steps`, `negative_prompt`, `guidance_scale`, `sampler`, `schedule` are ours."""

    model_config = ConfigDict(json_schema_extra=_allow_blanks)

    prompt: Prompt
    model: Name | None = None
    n: Annotated[int, Field(ge=1, le=JOB_IMAGES), WHOLE] | None = None
    size: (
        Annotated[
            str,
            Field(
                max_length=20,
                description="WIDTHxHEIGHT in pixels, or auto.",
                json_schema_extra={"pattern": r"^(auto|[0-9]{1,4}x[0-9]{1,4})$"},
            ),
        ]
        | None
    ) = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=0, le=100), WHOLE] | None = Field(
        None, description="Quality of jpeg and webp, in percent."
    )
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3), WHOLE] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Quality | None = Field(None, description="Taken, and without effect.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Likewise.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Likewise.")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="Likewise; `strength` is what an edit has.")
    user: Name | None = Field(None, description="Likewise.")
    safety_identifier: Name | None = Field(None, description="Likewise.")
    negative_prompt: str | None = None
    steps: Steps | None = None
    num_inference_steps: Steps | None = Field(None, description="Another name of `steps`.")
    guidance_scale: Guidance | None = None
    seed: RandomSeed | None = Field(None, description=f"Default, and {RANDOM}: drawn.")
    sampler: Sampler | None = None
    schedule: Schedule | None = None


class Generation(ImageParams):
    """`POST /v1/images/generations`."""


class Edit(ImageParams):
    """The fields of `POST /v1/images/edits`, beside its files `image` and `mask`."""

    strength: Strength | None = None


Params = TypeVar("Params", Generation, Edit)


def image_params(kind: type[Params], value: Mapping[str, Any], *, is_form: bool) -> Params:
    """Check parameters; those of a form are strings, and read as numbers where numbers are wanted.

    Raises:
        ProblemError: the first that is wrong.
    """
    optional = kind.model_fields.keys() - {"prompt"}
    value = {name: given for name, given in value.items() if given != "" or name not in optional}
    try:
        params = kind.model_validate(value, strict=not is_form)
    except ValidationError as error:
        raise field_problem(error.errors(include_url=False)[0], value) from None
    is_lossless = (params.output_format or "png") == "png"
    if params.output_compression not in (None, 100) and is_lossless:
        raise invalid(
            "output_compression", "output_compression is for jpeg and webp: a png is never compressed lossily"
        )
    if params.response_format == "url" and (params.stream or params.output_compression is not None):
        raise invalid("response_format", "response_format can't be url together with stream or output_compression")
    steps = {params.steps, params.num_inference_steps} - {None}
    if len(steps) > 1:
        raise invalid("num_inference_steps", "num_inference_steps is another name of steps, and the two differ")
    if params.partial_images and not params.stream:
        raise invalid("partial_images", "partial_images needs stream: true")
    return params


def generation_job(
    params: Generation, model: ServedModel, *, any_model: bool = False
) -> ImageGeneration | ImageTransform | ImageInpaint:
    """The job of a generation; with `any_model` it is this model's, whichever was asked for."""
    width, height = _size(params.size)
    return job_request(
        {**_common(params, model, any_model), "operation": "image_generation", "width": width, "height": height}
    )


def edit_job(
    params: Edit, image: Given, mask: Given | None, model: ServedModel, *, any_model: bool = False
) -> tuple[ImageGeneration | ImageTransform | ImageInpaint, dict[str, Given]]:
    """The job of an edit, and its pictures by the job's fields.

    A mask's fully transparent pixels are repainted: the opposite of our own masks.
    """
    width, height = _size(params.size)
    if width is not None and height is not None:
        picture = ImageOps.exif_transpose(image.picture).resize((width, height), Image.Resampling.LANCZOS)
        image = Given(write_picture(picture, "png"), picture)
    job = {**_common(params, model, any_model), "strength": params.strength}
    if mask is None:
        wanted = job_request({**job, "operation": "image_transform", "input_image": _base64(image.data)})
        return wanted, {"input_image": image}
    covered = mask.picture
    if "A" not in covered.getbands() and "transparency" not in covered.info:
        raise invalid("mask", "mask must have transparency: what is fully transparent is repainted")
    alpha = np.asarray(covered.convert("RGBA").getchannel("A"))
    painted = Image.fromarray(np.where(alpha == 0, 255, 0).astype(np.uint8))
    white = Given(write_picture(painted, "png"), painted)
    strength = MASKED_STRENGTH if params.strength is None else params.strength
    files = {"init_image": _base64(image.data), "mask_image": _base64(white.data)}
    wanted = job_request({**job, "operation": "image_inpaint", "strength": strength, **files})
    return wanted, {"init_image": image, "mask_image": white}


def _common(params: ImageParams, model: ServedModel, any_model: bool) -> dict[str, Any]:
    steps = params.num_inference_steps if params.steps is None else params.steps
    every = (steps or model.steps) // ((params.partial_images or 0) + 1)
    return {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "model": None if any_model else params.model,
        "num_images": params.n,
        "steps": steps,
        "guidance_scale": params.guidance_scale,
        "seed": None if params.seed == RANDOM else params.seed,
        "sampler": params.sampler,
        "schedule": params.schedule,
        "preview_every": max(every, 1) if params.partial_images else 0,
        # What is to be compressed harder than usual is kept whole, and encoded when it is sent.
        "response": "png" if params.output_compression is not None else params.output_format,
    }


def renamed(problem: ProblemError) -> ProblemError:
    """The same problem, with the field named as these clients know it."""
    field = problem.field and _PARAMS.get(problem.field, problem.field)
    message = problem.message
    if field != problem.field and message.startswith(f"{problem.field}"):
        message = f"{field}{message.removeprefix(problem.field or '')}"
    return ProblemError(problem.status, problem.code, message, field=field, headers=problem.headers)


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None or text == "auto":
        return None, None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise invalid("size", f"size must be like 512x512 (width x height) or auto, not {shown(text)}")
    return int(match[1]), int(match[2])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
