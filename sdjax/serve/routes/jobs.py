"""The job routes: submit, read, list, listen, cancel."""

import logging
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdjax.serve.bodies import parse_object, read_body
from sdjax.serve.front import Front, front_of, owner_of, viewer_of
from sdjax.serve.logs import about_job, log_accepted
from sdjax.serve.pictures import MEDIA_TYPES, media_type
from sdjax.serve.problems import ProblemError, invalid, shown
from sdjax.serve.queue import read_pictures
from sdjax.serve.routes import by_method
from sdjax.serve.schemas import job_request
from sdjax.serve.store import FINAL, Job
from sdjax.serve.stream import stream_job

PAGE, LARGEST_PAGE = 50, 200
PICTURE_HEADERS = {
    "Cache-Control": "private, max-age=31536000, immutable",
    "Content-Security-Policy": "default-src 'none'; sandbox",
}

logger = logging.getLogger(__name__)


async def submit(request: Request) -> Response:
    """`POST /v1/jobs`. The body is read as JSON whatever its type is said to be: `curl -d` alone calls it a form."""
    front = front_of(request)
    model = front.model()
    owner = owner_of(request)
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 255:
        raise invalid("Idempotency-Key", "Idempotency-Key must have from 1 to 255 characters")
    body = await read_body(request)

    wanted = await to_thread.run_sync(lambda: job_request(parse_object(body)), limiter=front.submitters)
    pictures = await read_pictures(wanted, front.decoder)

    def accept() -> Job:
        return front.queue.submit(wanted, model, pictures, owner=owner, idempotency_key=key)

    job = await to_thread.run_sync(accept, limiter=front.submitters)
    log_accepted(job)
    place = _place(request, job)
    return JSONResponse({"job_id": job.id, "sse_url": f"{place}/stream"}, headers={"Location": place})


async def read(request: Request) -> Response:
    """`GET /v1/jobs/{job_id}`."""
    return JSONResponse(await view(request, await _job(request)))


async def page(request: Request) -> Response:
    """`GET /v1/jobs?limit=&before=`, newest first."""
    front = front_of(request)
    viewer = viewer_of(request)
    limit = _limit(request.query_params.get("limit"))
    before = request.query_params.get("before")
    if before is not None:
        try:
            await front.registry.job(before, viewer)
        except ProblemError:
            message = f"before must be the id of a job, not {shown(before)}"
            raise ProblemError(404, "not_found", message, field="before") from None
    found = await front.registry.jobs(before=before, limit=limit + 1, owner=viewer)
    jobs = [await view(request, job) for job in found[:limit]]
    return JSONResponse({"jobs": jobs, "next": jobs[-1]["job_id"] if len(found) > limit else None})


async def stream(request: Request) -> Response:
    """`GET /v1/jobs/{job_id}/stream`."""
    front = front_of(request)
    last = request.headers.get("last-event-id")
    return await stream_job(front.registry, await _job(request), last, keep_alive=front.settings.keep_alive)


async def image(request: Request) -> Response:
    """`GET /v1/jobs/{job_id}/images/{n}`."""
    front = front_of(request)
    job, number = await _job(request), request.path_params["n"]
    if not number.isascii() or not number.isdigit():
        raise ProblemError(404, "not_found", "pictures have numbers, from 0 on")
    kind, content = await front.registry.image(job, int(number[:19]))
    name = f"{job.id}-{int(number)}.{kind}"
    headers = {**PICTURE_HEADERS, "Content-Disposition": f'inline; filename="{name}"'}
    return Response(content, media_type=MEDIA_TYPES[kind], headers=headers)


async def given(request: Request) -> Response:
    """`GET /v1/jobs/{job_id}/inputs/{name}`: a picture that the request brought."""
    front = front_of(request)
    content = await front.registry.given(await _job(request), request.path_params["name"])
    return Response(content, media_type=media_type(content), headers=PICTURE_HEADERS)


async def cancel(request: Request) -> Response:
    """`DELETE /v1/jobs/{job_id}`: 200 once it is cancelled, now or before; 409 where it had ended otherwise."""
    front = front_of(request)
    job = await front.registry.cancel(await _job(request))
    if job.state != "cancelled":
        raise ProblemError(409, "already_finished", f"the job has ended: {job.state}")
    with about_job(job.id):
        logger.info("cancelled")
    return JSONResponse(await view(request, job))


async def delete(request: Request) -> Response:
    """`DELETE /v1/jobs/{job_id}/record`: forget a job that has ended; 409 where it hasn't."""
    front = front_of(request)
    job = await _job(request)
    if not await front.registry.delete(job):
        raise ProblemError(409, "not_finished", "the job has not ended: cancel it first")
    with about_job(job.id):
        logger.info("deleted")
    return Response(status_code=204)


async def view(request: Request, job: Job) -> dict[str, Any]:
    """A job as `schemas.JobView` describes it."""
    front, place = front_of(request), _place(request, job)
    position = await front.registry.position(job)
    loras = [{"path": lora["name"], "strength": lora["strength"]} for lora in job.request["loras"]]
    asked = {name: value for name, value in job.request.items() if name != "warnings"}
    error = None
    if job.state == "error":
        last = await front.registry.last_event(job)
        said = last.data if last is not None else {}
        error = {"code": said.get("code", "error"), "message": said.get("message", "")}
    return {
        "job_id": job.id,
        "state": job.state,
        "request": {**asked, "loras": loras},
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "position": position,
        "eta_seconds": await _eta(front, job),
        "timings": dict(job.timings),
        "images": [f"{place}/images/{n}" for n in range(job.images)],
        "warnings": job.request.get("warnings", []),
        "error": error,
        "sse_url": f"{place}/stream",
    }


async def _eta(front: Front, job: Job) -> float | None:
    """Seconds until a job is complete, about, by the steps that the engine has measured."""
    if front.worker.engine is None or job.state in FINAL:
        return None
    stats, waits = front.worker.engine.stats(), job.state == "queued"
    seconds = stats.eta_queued(await front.registry.ahead(job)) if waits else stats.eta_leased(job.id)
    return None if seconds is None else round(seconds, 1)


def _place(request: Request, job: Job) -> str:
    """A job's path as its client sees it: behind a proxy that may be below another path."""
    return f"{request.scope['root_path']}/v1/jobs/{job.id}"


async def _job(request: Request) -> Job:
    return await front_of(request).registry.job(request.path_params["job_id"], viewer_of(request))


def _limit(text: str | None) -> int:
    if text is None:
        return PAGE
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= LARGEST_PAGE):
        raise invalid("limit", f"limit must be a whole number from 1 to {LARGEST_PAGE}, not {shown(text)}")
    return int(text)


ROUTES = [
    by_method("/v1/jobs", GET=page, POST=submit),
    by_method("/v1/jobs/{job_id}", GET=read, DELETE=cancel),
    by_method("/v1/jobs/{job_id}/stream", GET=stream),
    by_method("/v1/jobs/{job_id}/images/{n}", GET=image),
    by_method("/v1/jobs/{job_id}/inputs/{name}", GET=given),
    by_method("/v1/jobs/{job_id}/record", DELETE=delete),
]
