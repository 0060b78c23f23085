"""The routes that OpenAI's image clients call."""

import base64
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import anyio
from anyio import to_thread
from PIL import Image
from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdjax.serve.bodies import parse_object, read_body
from sdjax.serve.forms import read_form
from sdjax.serve.front import Front, front_of, owner_of
from sdjax.serve.links import signed
from sdjax.serve.logs import log_accepted
from sdjax.serve.openai_schemas import Edit, Generation, ImageParams, edit_job, generation_job, image_params, renamed
from sdjax.serve.pictures import Given, Limits, PictureError, write_picture
from sdjax.serve.problems import ProblemError, invalid, openai_error, shown, storage_problem
from sdjax.serve.queue import MASK
from sdjax.serve.routes import by_method
from sdjax.serve.schemas import ImageGeneration, ImageInpaint, ImageTransform
from sdjax.serve.served import ServedModel
from sdjax.serve.storage import StorageError, reason
from sdjax.serve.store import FINAL, Event, Job
from sdjax.serve.stream import event_stream, to_json

NO_RETRY = {"X-Should-Retry": "false"}
"""OpenAI's clients try again after a 500 unless they are told not to: a job that failed would fail again."""
CLIENT_LEFT = 499
"""The status that nginx gives to a client that left: nobody reads it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """A job that somebody waits for, and how they want to have it."""

    job: Job
    params: ImageParams
    prefix: str

    @property
    def format(self) -> str:
        """Of the pictures."""
        return self.params.output_format or "png"

    def described(self) -> dict[str, Any]:
        """What answers and events say of a picture."""
        return {
            "size": f"{self.job.request['width']}x{self.job.request['height']}",
            "quality": self.params.quality or "auto",
            "background": "opaque",
            "output_format": self.format,
        }

    def encoded(self, kind: str, content: bytes) -> str:
        """A picture in base64, in the format and quality that were asked for."""
        if kind != self.format or self.params.output_compression is not None:
            with Image.open(BytesIO(content)) as picture:
                content = write_picture(picture, self.format, self.params.output_compression)
        return base64.b64encode(content).decode()


async def generations(request: Request) -> Response:
    """`POST /v1/images/generations`."""
    front = front_of(request)
    model = front.model()
    body = await read_body(request)

    def read() -> tuple[Generation, ImageGeneration | ImageTransform | ImageInpaint]:
        params = image_params(Generation, parse_object(body), is_form=False)
        return params, generation_job(params, model, any_model=front.settings.any_model)

    with _renamed():
        params, wanted = await to_thread.run_sync(read, limiter=front.submitters)
        job = await _submitted(request, model, wanted, {})
    return await _drawn(request, Drawing(job, params, "image_generation"))


async def edits(request: Request) -> Response:
    """`POST /v1/images/edits`, a form with files."""
    return await _drawn(request, await _edit(request))


async def _edit(request: Request) -> Drawing:
    """Submit an edit. Its pictures are let go with the return: who waits for theirs holds no memory."""
    front = front_of(request)
    model = front.model()
    images, mask, fields = await read_form(request)
    params = image_params(Edit, fields, is_form=True)
    if len(images) != 1:
        raise invalid("image", f"image must be one picture, not {len(images)}")
    image = await _picture("image", images[0], Limits(), front)
    covered = None if mask is None else await _picture("mask", mask, MASK, front)
    with _renamed():
        wanted, pictures = await to_thread.run_sync(
            partial(edit_job, params, image, covered, model, any_model=front.settings.any_model),
            limiter=front.submitters,
        )
        job = await _submitted(request, model, wanted, pictures)
    return Drawing(job, params, "image_edit")


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    front, served = front_of(request), front_of(request).worker.model
    found = [] if served is None else [_model(front, served, name) for name in (served.name, *front.settings.alias)]
    return JSONResponse({"object": "list", "data": found})


async def model(request: Request) -> Response:
    """`GET /v1/models/{name}`."""
    front = front_of(request)
    name, served = request.path_params["name"], front.worker.model
    if served is not None and (name in front.settings.alias or front.settings.any_model):
        return JSONResponse(_model(front, served, name))
    if served is None or name not in {served.name, *served.aliases}:
        raise ProblemError(404, "model_not_found", f"there is no model {shown(name)} here", field="model")
    return JSONResponse(_model(front, served, served.name))


async def _submitted(
    request: Request,
    model: ServedModel,
    wanted: ImageGeneration | ImageTransform | ImageInpaint,
    pictures: Mapping[str, Given],
) -> Job:
    front, owner = front_of(request), owner_of(request)

    def accept() -> Job:
        return front.queue.submit(wanted, model, pictures, owner=owner)

    job = await to_thread.run_sync(accept, limiter=front.submitters)
    log_accepted(job)
    return job


async def _drawn(request: Request, drawing: Drawing) -> Response:
    """Wait for a job, and answer with what comes of it, as one answer or as a stream."""
    front = front_of(request)
    if drawing.params.stream:
        return event_stream(_streamed(front, drawing), keep_alive=front.settings.keep_alive)
    try:
        if not await _waited(request, front, drawing.job):
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(await _answer(request, front, drawing))
    finally:
        await _give_up(front, drawing.job)


async def _waited(request: Request, front: Front, job: Job) -> bool:
    """Wait until the job is complete; False where the client left before.

    Raises:
        ProblemError: it failed.
        StorageError: the store fails.
    """
    is_gone = False
    failed: StorageError | None = None
    last: Event | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            nonlocal is_gone
            while (await request.receive())["type"] != "http.disconnect":
                pass
            is_gone = True
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            async with aclosing(front.registry.story(job.id)) as story:
                async for event in story:
                    last = event
        except StorageError as error:  # raised outside of the group, which would wrap it
            failed = error
        group.cancel_scope.cancel()
    if is_gone:
        return False
    if failed is not None:
        raise failed
    _check(last)
    return True


def _check(last: Event | None) -> None:
    if last is not None and last.name == "complete":
        return
    if last is not None and last.name == "error":
        code, message = str(last.data.get("code", "error")), str(last.data.get("message", "the job failed"))
        raise ProblemError(500, code, message, headers=None if code == "storage" else NO_RETRY)
    if last is not None and last.name == "cancelled":
        raise ProblemError(410, "cancelled", "the job was cancelled")
    raise ProblemError(503, "draining", "the server stops")


async def _answer(request: Request, front: Front, drawing: Drawing) -> dict[str, Any]:
    job, params = drawing.job, drawing.params
    if params.response_format == "url":
        base, secret = str(request.base_url).rstrip("/"), front.link_secret
        paths = [f"/v1/jobs/{job.id}/images/{n}" for n in range(job.request["num_images"])]
        data = [{"url": base + (path if secret is None else signed(path, secret))} for path in paths]
    else:
        pictures = await front.registry.images(job.id)
        data = await to_thread.run_sync(lambda: [{"b64_json": drawing.encoded(*picture)} for picture in pictures])
    warnings = job.request.get("warnings")
    return {
        "created": int(time.time()),
        "data": data,
        **drawing.described(),
        "usage": NO_TOKENS,
        "seed": job.request["seed"],
        **({"warnings": warnings} if warnings else {}),
    }


async def _streamed(front: Front, drawing: Drawing) -> AsyncIterator[ServerSentEvent]:
    """Partial pictures as they come, and the finished ones; these streams have no ids, and can't be resumed."""
    sent = 0
    last: Event | None = None
    try:
        try:
            async with aclosing(front.registry.story(drawing.job.id)) as story:
                async for event in story:
                    last = event
                    if event.name == "preview" and sent < (drawing.params.partial_images or 0):
                        yield await _partial(drawing, event.data, sent)
                        sent += 1
            _check(last)
            pictures = await front.registry.images(drawing.job.id)
        except (ProblemError, StorageError) as error:
            problem = storage_problem(error) if isinstance(error, StorageError) else error
            yield ServerSentEvent(to_json({"type": "error", **openai_error(problem)}), event="error", sep="\n")
            return
        for kind, content in pictures:
            encoded = await to_thread.run_sync(drawing.encoded, kind, content)
            yield _event(drawing, "completed", {"b64_json": encoded, "usage": NO_TOKENS})
    finally:
        await _give_up(front, drawing.job)


async def _partial(drawing: Drawing, preview: Mapping[str, Any], index: int) -> ServerSentEvent:
    def encoded() -> str:
        if preview["format"] == drawing.format:
            return str(preview["image"])
        with Image.open(BytesIO(base64.b64decode(preview["image"]))) as picture:
            return base64.b64encode(write_picture(picture, drawing.format)).decode()

    data = {"b64_json": await to_thread.run_sync(encoded), "partial_image_index": index}
    return _event(drawing, "partial_image", data)


def _event(drawing: Drawing, what: str, data: Mapping[str, Any]) -> ServerSentEvent:
    name = f"{drawing.prefix}.{what}"
    head = {"type": name, "created_at": int(time.time())}
    return ServerSentEvent(to_json({**head, **drawing.described(), **data}), event=name, sep="\n")


async def _give_up(front: Front, job: Job) -> None:
    """Cancel the job unless it is final, whatever ended the wait for it."""
    with anyio.CancelScope(shield=True):
        try:
            if (await front.registry.job(job.id)).state not in FINAL:
                await front.registry.cancel(job)
        except StorageError as error:
            logger.warning("could not be cancelled: %s", reason(error), extra={"job": job.id})


@contextmanager
def _renamed() -> Iterator[None]:
    """Name fields in errors as these clients know them."""
    try:
        yield
    except ProblemError as problem:
        raise renamed(problem) from None


async def _picture(name: str, data: bytes, limits: Limits, front: Front) -> Given:
    try:
        return Given(data, await front.decoder.read(data, limits))
    except PictureError as error:
        raise invalid(name, f"{name}: {error}") from None


def _model(front: Front, served: ServedModel, name: str) -> dict[str, Any]:
    """As OpenAI describes it, by one of its names, and under `sdjax` what a form for jobs needs to know."""
    own = {
        "steps": served.steps,
        "guidance_scale": served.guidance_scale,
        "sampler": served.sampler,
        "size": served.size,
        "least_side": served.least_side,
        "most_pixels": served.most_pixels,
        "needs_mask": served.needs_mask,
    }
    known = {"id": name, "object": "model", "created": int(front.worker.since), "owned_by": "sdjax"}
    return {**known, "sdjax": own}


NO_TOKENS = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""These clients expect the field; nothing here is paid for by the token."""

ROUTES = [
    by_method("/v1/images/generations", POST=generations),
    by_method("/v1/images/edits", POST=edits),
    by_method("/v1/models", GET=models),
    by_method("/v1/models/{name:path}", GET=model),
]
