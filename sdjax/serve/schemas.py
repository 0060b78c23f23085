"""What goes over the wire, as pydantic models: jobs that are asked for, what is answered, and the events of a stream.

They are strict: a string is no number, a number is no flag, nothing is NaN, and a field that an operation doesn't have
is an error, so that a slip of the keyboard is seen. Fields that have a default take null for it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sdjax.limits import (
    JOB_GUIDANCE,
    JOB_IMAGES,
    JOB_LEAST_SIDE,
    JOB_LORA_WEIGHT,
    JOB_LORAS,
    JOB_MULTIPLE,
    JOB_PROMPT,
    JOB_STEPS,
    LAST_SEED,
    MAX_SIDE,
)
from sdjax.schedulers import SAMPLERS
from sdjax.serve.problems import SHOWN, ProblemError, invalid, shown

MAX_NAME = 255
OPERATIONS = ("image_generation", "image_transform", "image_inpaint")


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("it must not be empty")
    return value


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 20.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _sampler(value: str) -> str:
    if value not in SAMPLERS:
        raise ValueError(f"it must be one of {', '.join(SAMPLERS)}")
    return value


WHOLE = BeforeValidator(_whole)
Name: TypeAlias = Annotated[str, Field(max_length=MAX_NAME)]
Prompt: TypeAlias = Annotated[str, Field(min_length=1, max_length=JOB_PROMPT), AfterValidator(_not_blank)]
Side: TypeAlias = Annotated[int, Field(ge=JOB_MULTIPLE, le=MAX_SIDE, multiple_of=JOB_MULTIPLE), WHOLE]
Sampler: TypeAlias = Annotated[
    str, Field(max_length=MAX_NAME, json_schema_extra={"enum": list(SAMPLERS)}), AfterValidator(_sampler)
]
Schedule: TypeAlias = Literal["karras", "exponential", "beta", "ays"]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=LAST_SEED), WHOLE]
Steps: TypeAlias = Annotated[int, Field(ge=1, le=JOB_STEPS), WHOLE]
Guidance: TypeAlias = Annotated[float, Field(ge=0, le=JOB_GUIDANCE, allow_inf_nan=False)]
Strength: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Format: TypeAlias = Literal["png", "jpeg", "webp"]
Base64: TypeAlias = Annotated[
    str,
    Field(
        min_length=1,
        description="A PNG, JPEG or WebP file in base64; a `data:` prefix, line breaks, the URL-safe alphabet and "
        "missing padding are fine.",
    ),
]


class Strict(BaseModel):
    """What comes in is taken as it is or refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Lora(Strict):
    """An adapter and its weight."""

    path: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] = Field(
        description="A file or folder inside the server's adapter folder."
    )
    strength: Annotated[float, Field(ge=-JOB_LORA_WEIGHT, le=JOB_LORA_WEIGHT, allow_inf_nan=False)] = 1.0


class JobFields(Strict):
    """What every operation takes."""

    prompt: Prompt
    negative_prompt: Annotated[str, Field(max_length=JOB_PROMPT)] | None = None
    steps: Steps | None = Field(None, description="Default 20; 4 for turbo.")
    guidance_scale: Guidance | None = Field(
        None, description="Default 7.5; 0 for turbo, and 3 for the bundled tiny model, which is best at that."
    )
    seed: Seed | None = Field(None, description="Default: drawn, and reported by `complete` and by the job.")
    sampler: Sampler | None = Field(None, description="Default: the model's own.")
    schedule: Schedule | None = Field(None, description="Spacing of the noise levels; default: the model's own.")
    num_images: Annotated[int, Field(ge=1, le=JOB_IMAGES), WHOLE] | None = Field(
        None, description="Default 1. The pictures after the first take the seeds that follow."
    )
    loras: Annotated[list[Lora], Field(max_length=JOB_LORAS)] | None = None
    preview_every: Annotated[int, Field(ge=0, le=JOB_STEPS), WHOLE] | None = Field(
        None, description="Steps between previews; 0, the default, is none."
    )
    response: Format | None = Field(None, description="Of the finished pictures; default png.")
    cancel_on_disconnect: bool | None = Field(
        None, description="Cancel the job when the last reader of its stream leaves; default false: it goes on."
    )
    model: Name | None = Field(None, description="Must be the model that is served, where it is given.")
    hive_id: Name | None = Field(None, description="Repeated by the job, and else of no meaning.")
    worker_id: Name | None = Field(None, description="Likewise.")


class ImageGeneration(JobFields):
    """Draw from words."""

    operation: Literal["image_generation"]
    width: Side | None = Field(
        None,
        description=f"Default: the model's own. From {JOB_LEAST_SIDE}, or the model's own size where that is smaller.",
    )
    height: Side | None = Field(None, description="Likewise.")


class ImageTransform(JobFields):
    """Draw from words and a picture, at the picture's size."""

    operation: Literal["image_transform"]
    input_image: Base64
    strength: Strength | None = Field(None, description="How much is drawn anew; default 0.8.")


class ImageInpaint(JobFields):
    """Draw a part of a picture anew."""

    operation: Literal["image_inpaint"]
    init_image: Base64
    mask_image: Base64 = Field(description="White is repainted, black is kept.")
    strength: Strength | None = Field(None, description="How much is drawn anew; default 0.8.")


JobRequest: TypeAlias = Annotated[ImageGeneration | ImageTransform | ImageInpaint, Field(discriminator="operation")]
_REQUEST: TypeAdapter[ImageGeneration | ImageTransform | ImageInpaint] = TypeAdapter(JobRequest)


class Accepted(BaseModel):
    """A job was accepted."""

    job_id: str
    sse_url: str


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class JobView(BaseModel):
    """A job as it stands."""

    job_id: str
    state: Literal["queued", "running", "complete", "error", "cancelled"]
    request: dict[str, Any] = Field(description="As it was accepted, defaults filled in; pictures by their SHA-256.")
    created: float = Field(description="Seconds since the epoch.")
    started: float | None
    finished: float | None
    position: int | None = Field(description="In the queue; null when it doesn't wait.")
    eta_seconds: float | None = Field(
        description="Until it is complete, about; null while nothing is known, and after its end."
    )
    timings: dict[str, float] = Field(description="Seconds by phase, once it is complete.")
    images: list[str] = Field(description="Where its pictures are.")
    warnings: list[str] = Field(
        description="What of the request was cut, replaced or ignored, and what the model does not know."
    )
    error: JobError | None
    sse_url: str


class JobList(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[JobView]
    next: str | None = Field(description="`before` of the next page; null on the last.")


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str
    field: str | None


class ErrorAnswer(BaseModel):
    """Every error of the job routes."""

    error: ErrorDetail


class Health(BaseModel):
    """Of the process."""

    status: str


class Readiness(BaseModel):
    """Of the model."""

    status: Literal["starting", "ready", "draining", "error", "storage_failed"]
    model: str | None
    reason: str | None = Field(None, description="Why nothing can be stored now.")


class QueuedEvent(BaseModel):
    """Waiting; position 1 is next."""

    type: Literal["queued"]
    position: int


class ProgressEvent(BaseModel):
    """Steps that are done."""

    type: Literal["progress"]
    step: int
    total: int
    percent: float


class PreviewEvent(BaseModel):
    """What the picture will look like, about."""

    type: Literal["preview"]
    step: int
    total: int
    percent: float
    image: str
    format: str


class CompleteEvent(BaseModel):
    """The pictures, in base64. `image` is the first of `images`."""

    type: Literal["complete"]
    image: str
    format: str
    images: list[str]
    seed: int
    timings: dict[str, float]


class ErrorEvent(BaseModel):
    """The job failed."""

    type: Literal["error"]
    message: str
    code: str


class CancelledEvent(BaseModel):
    """The job was cancelled."""

    type: Literal["cancelled"]


class ClosingEvent(BaseModel):
    """The server stops before the job is done; it has no id, and is no part of the job's story."""

    type: Literal["closing"]


EVENTS = (QueuedEvent, ProgressEvent, PreviewEvent, CompleteEvent, ErrorEvent, CancelledEvent, ClosingEvent)


def job_request(value: dict[str, Any]) -> ImageGeneration | ImageTransform | ImageInpaint:
    """Check a request.

    Raises:
        ProblemError: the first field that is wrong.
    """
    try:
        return _REQUEST.validate_python(value)
    except ValidationError as error:
        raise field_problem(error.errors(include_url=False)[0], value) from None


def field_problem(error: ErrorDetails, value: Mapping[str, Any]) -> ProblemError:
    """One of pydantic's errors: the field, what is allowed, and what was given, where that is short."""
    kind, allowed = error["type"], " or ".join(OPERATIONS)
    if kind == "union_tag_not_found":
        return invalid("operation", f"operation is required: {allowed}")
    if kind == "union_tag_invalid":
        return invalid("operation", f"operation must be {allowed}, not {shown(value['operation'])}")
    place = [str(part) for part in error["loc"] if part not in OPERATIONS]
    field = ".".join(part[:SHOWN] for part in place)
    if kind == "missing":
        return invalid(field, f"{field} is required")
    if kind == "extra_forbidden":
        return invalid(field, f"there is no field {shown(place[-1])} here")
    said = error["msg"].removeprefix("Value error, ").replace("Input should", "it should", 1)
    return invalid(field, f"{field}: {said[:200]}, and it is {shown(error['input'])}")
