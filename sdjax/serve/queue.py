"""The way in: a request is checked, its defaults are filled in, and it waits in the store."""

import hashlib
import math
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from anyio import to_thread
from PIL import Image

from sdjax.errors import CheckpointError, SdjaxError
from sdjax.limits import JOB_LORAS, JOB_MULTIPLE, MAX_SIDE
from sdjax.serve import adapters
from sdjax.serve.buckets import bucket
from sdjax.serve.decoder import Decoder
from sdjax.serve.failures import without_paths
from sdjax.serve.pictures import ORIENTATION, Given, Limits, PictureError, from_base64
from sdjax.serve.problems import ProblemError, invalid, shown
from sdjax.serve.schemas import ImageGeneration, ImageInpaint, ImageTransform
from sdjax.serve.served import ServedModel
from sdjax.serve.store import Job, QueueFullError, Store

STRENGTH = 0.8
MASK = Limits(least_side=1)
"""A mask is stretched over its picture, so it may be small."""
PICTURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"image_transform": ("input_image",), "image_inpaint": ("init_image", "mask_image")}
)
"""The fields that hold pictures, by operation; the first gives the size."""
RECENT = 0.2
"""Weight of the newest job in the mean of how long jobs take."""
LONGEST_RETRY = 600


class RequestQueue:
    """Where jobs are submitted.

    Args:
        store: keeps them.
        limit: jobs that may wait.
        owner_limit: unfinished jobs that one owner may have.
        lora_dir: the folder that `loras` are looked for in.
    """

    def __init__(
        self, store: Store, *, limit: int | None = None, owner_limit: int | None = None, lora_dir: Path | None = None
    ) -> None:
        self._store = store
        self._limit = limit
        self._owner_limit = owner_limit
        self._lora_dir = lora_dir
        self._seconds: float | None = None
        self._guard = threading.Lock()

    def submit(
        self,
        wanted: ImageGeneration | ImageTransform | ImageInpaint,
        model: ServedModel,
        pictures: Mapping[str, Given] = MappingProxyType({}),
        *,
        owner: str = "",
        idempotency_key: str | None = None,
    ) -> Job:
        """Check a request against the model and put it into the queue. It writes to the disk: not for an event loop's
        thread.

        Args:
            wanted: the request.
            model: what is served.
            pictures: those of the request, by its fields; see `read_pictures`.
            owner: whose job it becomes.
            idempotency_key: a second request with it is answered with the first one's job.

        Raises:
            ProblemError: something is wrong with it (409, 422), or the queue is full (429).
        """
        _check_model(wanted.model, model)
        request, blobs = resolved(wanted, model, pictures, self._lora_dir)
        try:
            return self._store.submit(
                request,
                bucket=bucket(request),
                owner=owner,
                idempotency_key=idempotency_key,
                blobs=blobs,
                queue_limit=self._limit,
                owner_limit=self._owner_limit,
            )
        except QueueFullError as error:
            after = min(max(round(self._seconds or 1), 1), LONGEST_RETRY)
            raise ProblemError(429, "queue_full", str(error), headers={"Retry-After": str(after)}) from None

    def took(self, seconds: float) -> None:
        """Learn how long a job took: about when there is room again."""
        with self._guard:
            known = self._seconds
            self._seconds = seconds if known is None else known + RECENT * (seconds - known)


async def read_pictures(wanted: ImageGeneration | ImageTransform | ImageInpaint, decoder: Decoder) -> dict[str, Given]:
    """Decode the pictures of a request.

    Raises:
        ProblemError: one is none that we take (422), or the decoder is busy (503).
    """
    found = {}
    for name in PICTURES.get(wanted.operation, ()):
        try:
            data = await to_thread.run_sync(from_base64, getattr(wanted, name))
            picture = await decoder.read(data, MASK if name == "mask_image" else Limits())
        except PictureError as error:
            raise invalid(name, f"{name}: {error}") from None
        found[name] = Given(data, picture)
    return found


def resolved(
    wanted: ImageGeneration | ImageTransform | ImageInpaint,
    model: ServedModel,
    given: Mapping[str, Given],
    lora_dir: Path | None,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Fill in every default, and take the pictures out: the request as the store keeps it, and bytes by SHA-256.

    An adapter has its whole path there, and the `name` that it was asked for by, be it in `loras` or in the prompt;
    `warnings` are the library's.

    Raises:
        ProblemError: a value that this model, or no picture, can have.
    """
    if model.needs_mask and not isinstance(wanted, ImageInpaint):
        raise invalid("operation", f"{model.name} is an inpainting model: it takes image_inpaint alone")
    notes: list[str] = []
    loras = adapters.listed(wanted.loras, lora_dir)
    room = JOB_LORAS - len(loras)
    prompt, from_prompt = adapters.tagged(wanted.prompt, lora_dir, room=room, warn=notes.append)
    request: dict[str, Any] = {
        "operation": wanted.operation,
        "prompt": wanted.prompt,
        "negative_prompt": wanted.negative_prompt,
        "steps": model.steps if wanted.steps is None else wanted.steps,
        "guidance_scale": model.guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale,
        "seed": secrets.randbits(32) if wanted.seed is None else wanted.seed,
        "sampler": model.sampler if wanted.sampler is None else wanted.sampler,
        "num_images": wanted.num_images or 1,
        "loras": [*loras, *from_prompt],
        "preview_every": wanted.preview_every or 0,
        "response": wanted.response or "png",
        "cancel_on_disconnect": bool(wanted.cancel_on_disconnect),
        "model": model.name,
        "hive_id": wanted.hive_id,
        "worker_id": wanted.worker_id,
    }
    blobs: dict[str, bytes] = {}
    if wanted.schedule is not None:
        request["schedule"] = wanted.schedule
    pictures = {name: picture for name, (_, picture) in given.items()}
    if isinstance(wanted, ImageGeneration):
        request["width"] = _side("width", wanted.width, model)
        request["height"] = _side("height", wanted.height, model)
        _check_area(request, model)
    else:
        request["strength"] = STRENGTH if wanted.strength is None else wanted.strength
        names = PICTURES[wanted.operation]
        for name in names:
            digest = hashlib.sha256(given[name].data).hexdigest()
            blobs[digest] = given[name].data
            request[name] = {"blob": digest}
        request["width"], request["height"] = _fitted(names[0], pictures[names[0]], model)
    try:
        # The library is asked as the client asked: a default that it replaces is one of the warnings.
        asked = {**request, "prompt": prompt, "sampler": wanted.sampler}
        notes += model.check(asked, pictures).warnings
        request["warnings"] = list(dict.fromkeys(notes))
    except SdjaxError as error:
        of_adapter = isinstance(error, CheckpointError) and request["loras"]
        message = without_paths(str(error), request)
        raise invalid("loras" if of_adapter else _field(message, request), message) from None
    return request, blobs


def _check_model(name: str | None, model: ServedModel) -> None:
    if name is not None and name != model.name and name not in model.aliases:
        raise ProblemError(409, "wrong_model", f"this worker serves {model.name}, not {shown(name)}", field="model")


def _field(message: str, request: Mapping[str, Any]) -> str | None:
    """The field that one of the library's messages is about: it begins with its name."""
    name = message.partition(" ")[0]
    return name if name in request else None


def _side(name: str, value: int | None, model: ServedModel) -> int:
    side = model.side(name) if value is None else value
    if side < model.least_side:
        raise invalid(name, f"{name} must be from {model.least_side} to {MAX_SIDE} pixels, not {side}")
    return side


def _check_area(request: Mapping[str, Any], model: ServedModel) -> None:
    width, height = request["width"], request["height"]
    if width * height > model.most_pixels:
        side = math.isqrt(model.most_pixels)
        raise invalid(
            "width" if width >= height else "height",
            f"width x height must be at most {model.most_pixels} pixels, such as {side}x{side}, not {width}x{height}",
        )


def _fitted(name: str, picture: Image.Image, model: ServedModel) -> tuple[int, int]:
    """The size that a picture is drawn at: its own, within what is allowed. Photos may say that they are turned."""
    sides = picture.size[::-1] if picture.getexif().get(ORIENTATION) in (5, 6, 7, 8) else picture.size
    shrink = min(1.0, MAX_SIDE / max(sides), math.sqrt(model.most_pixels / math.prod(sides)))
    width, height = (int(side * shrink) // JOB_MULTIPLE * JOB_MULTIPLE for side in sides)
    if min(width, height) < Limits().least_side:
        raise invalid(name, f"{name}: it is {picture.width}x{picture.height}, too long and thin to be drawn")
    return width, height
