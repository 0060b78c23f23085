"""A job's story as server-sent events."""

import base64
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import anyio
from anyio import to_thread
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.responses import Response

from sdjax.serve.problems import ProblemError
from sdjax.serve.registry import JobRegistry
from sdjax.serve.storage import StorageError, reason
from sdjax.serve.store import FINAL, Event, Job

logger = logging.getLogger(__name__)

SEND_WITHIN = 30.0
"""Seconds that a reader may leave our bytes unread before we let go of it."""

AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]  # our own drain ends streams, and says so in them


async def stream_job(registry: JobRegistry, job: Job, last_event_id: str | None, *, keep_alive: float) -> Response:
    """The answer to a reader. One that has heard the end gets 204, which tells an EventSource not to come back."""
    after = await registry.place(job, last_event_id)
    if after and job.state in FINAL and not await registry.has_more(job, after):
        return Response(status_code=204, media_type="text/event-stream")
    return event_stream(_told(registry, job, after), keep_alive=keep_alive)


def event_stream(events: AsyncIterator[ServerSentEvent], *, keep_alive: float) -> EventSourceResponse:
    """Events as a response, with comments where there are none for a while."""
    return EventSourceResponse(
        events,
        ping=keep_alive,
        ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        sep="\n",
        send_timeout=SEND_WITHIN,
    )


def to_json(data: Mapping[str, Any]) -> str:
    """JSON as it stands in a stream: on one line, `type` first."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def completed(data: Mapping[str, Any], pictures: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """The data of `complete` with the pictures in it."""
    images = [base64.b64encode(content).decode() for _, content in pictures]
    head = {"type": "complete", "image": images[0], "format": pictures[0][0]} if images else {"type": "complete"}
    return {**head, "images": images, **{name: value for name, value in data.items() if name not in head}}


async def _told(registry: JobRegistry, job: Job, after: int) -> AsyncIterator[ServerSentEvent]:
    name, is_failing = "", False
    try:
        async with aclosing(registry.story(job.id, after)) as story:
            async for event in story:
                name, data = await _sent(registry, job.id, event)
                yield ServerSentEvent(data, event=name, id=str(event.id), sep="\n")
    except StorageError as error:  # the stream ends here, and its reader comes back to go on
        is_failing = True
        logger.warning("a stream ends: %s", reason(error), extra={"job": job.id})
    finally:
        is_over = registry.is_closing or is_failing
        if job.request.get("cancel_on_disconnect") and not is_over and not registry.is_read(job):
            with anyio.CancelScope(shield=True):
                await registry.cancel(job)
    if name not in FINAL and registry.is_closing:
        yield ServerSentEvent(to_json({"type": "closing"}), event="closing", sep="\n")


async def _sent(registry: JobRegistry, job_id: str, event: Event) -> tuple[str, str]:
    """An event's name and data as clients have them: `complete` with its pictures, or, where one was lost, `error`."""
    data = {"type": event.name, **event.data}
    if event.name != "complete":
        return event.name, to_json(data)
    try:
        pictures = await registry.images(job_id)
    except ProblemError as problem:
        return "error", to_json({"type": "error", "code": problem.code, "message": problem.message})
    return event.name, await to_thread.run_sync(lambda: to_json(completed(data, pictures)))
