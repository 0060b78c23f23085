"""The application: the parts of a server, put together."""

import logging
import mimetypes
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.errors import SdjaxError
from sdjax.serve.bodies import BodyLimit
from sdjax.serve.forwarded import Forwarded, route_path
from sdjax.serve.front import Front, Worker
from sdjax.serve.heartbeat import heartbeat, keep_beating, say_goodbye, worker_name
from sdjax.serve.links import link_secret
from sdjax.serve.logs import about_job, log_request
from sdjax.serve.metrics import Metrics
from sdjax.serve.problems import Failures, ProblemError, answer, storage_problem
from sdjax.serve.queue import RequestQueue
from sdjax.serve.registry import JobRegistry
from sdjax.serve.routes import jobs, openai, operations
from sdjax.serve.security import Guard, SafeHeaders
from sdjax.serve.settings import Settings
from sdjax.serve.storage import StorageError, reason
from sdjax.serve.store import Store
from sdjax.serve.watched import Watched

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cache-Control": "no-cache",  # the browser keeps the files, and asks whether a new release has others
}
RETAIN_EVERY = 600.0
AGAIN_AFTER = 5.0

Boot: TypeAlias = Callable[[Worker], None]
"""Loads the model and starts the engine, and writes what comes of it into the worker; runs in a thread of its own."""

logger = logging.getLogger(__name__)


def create_app(settings: Settings, store: Store, boot: Boot) -> Starlette:
    """Build a server.

    Args:
        settings: how it runs.
        store: keeps the jobs; closed with the application.
        boot: starts what draws them, when the application starts.
    """
    front = Front(
        settings=settings,
        queue=RequestQueue(
            store, limit=settings.queue_limit, owner_limit=settings.key_limit, lora_dir=settings.lora_dir
        ),
        registry=JobRegistry(store),
        metrics=Metrics(),
        worker=Worker(),
        link_secret=link_secret(settings.data_dir) if settings.api_key else None,
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        front.registry.open()
        threading.Thread(target=_booted, args=(boot, front.worker), name="sdjax-boot", daemon=True).start()
        async with anyio.create_task_group() as group:
            group.start_soon(_lasting, partial(_follow, front))
            group.start_soon(front.metrics.watch_lag)
            group.start_soon(_lasting, front.decoder.start)
            group.start_soon(_lasting, partial(_retain, settings, store))
            if settings.callback_url:
                group.start_soon(_lasting, partial(_beat, front, settings.callback_url))
            yield
            await drain(front)
            group.cancel_scope.cancel()
        front.registry.close()
        await to_thread.run_sync(store.close)

    app = Starlette(
        routes=[*jobs.ROUTES, *openai.ROUTES, *operations.ROUTES],
        middleware=_middleware(front),
        exception_handlers={
            ProblemError: _on_problem,
            StorageError: _on_storage,
            HTTPException: _on_http,
            ClientDisconnect: _on_disconnect,
        },
        lifespan=lifespan,
    )
    mimetypes.add_type("text/javascript", ".js")  # a Windows registry may say otherwise, and browsers then refuse it
    # Not a mount: it would match every path, and hide that a route has another method.
    app.router.default = _page(StaticFiles(directory=PAGE, html=True))
    app.state.front = front
    return app


async def drain(front: Front) -> None:
    """Take no more jobs, let the running ones finish for a while, end the streams, and tell the hive. Twice is once."""
    if front.worker.status == "draining":
        return
    front.worker.status = "draining"
    try:
        if front.worker.engine is not None:
            await to_thread.run_sync(front.worker.engine.drain, front.settings.drain)
    finally:
        await front.decoder.close()
        front.registry.close_streams()
    if front.settings.callback_url:
        await say_goodbye(front.settings.callback_url, await _beat_data(front))


def _booted(boot: Boot, worker: Worker) -> None:
    try:
        boot(worker)
    except Exception as error:
        # What a user can do something about is said in one line.
        logger.error("the model could not be loaded: %s", error, exc_info=not isinstance(error, SdjaxError))
        worker.status = "error"


def _middleware(front: Front) -> list[Middleware]:
    settings = front.settings
    keys = [key.get_secret_value() for key in settings.api_key]
    origins = list(settings.cors_origin)
    cors = [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "last-event-id", "idempotency-key"],
            expose_headers=["retry-after"],
        )
    ]
    return [
        Middleware(Forwarded, trusted=settings.forwarded_allow_ips, root_path=settings.root_path),
        *([Middleware(Watched, began=log_request)] if settings.access_log else ()),
        Middleware(Watched, began=front.metrics.began),
        Middleware(SafeHeaders),
        *(cors if origins else ()),
        Middleware(Failures),
        Middleware(
            Guard,
            keys=keys,
            origins=origins,
            only_local=settings.is_loopback and not settings.allow_unauthenticated,
            hosts=settings.allow_host,
            link_secret=front.link_secret,
        ),
        Middleware(BodyLimit, limit=settings.max_body),
    ]


def _page(files: StaticFiles) -> ASGIApp:
    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or "\0" in scope["path"]:
            raise HTTPException(404)
        if not route_path(scope):  # the page's addresses are relative to the folder that it lies in
            await RedirectResponse(f"{scope['root_path']}/")(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(PAGE_HEADERS)
            await send(message)

        await files(scope, receive, with_headers)

    return page


async def _lasting(task: Callable[[], Awaitable[None]]) -> None:
    """Run what goes on beside the requests: where it fails, the disk perhaps, it is begun again."""
    while True:
        try:
            return await task()
        except StorageError as error:
            logger.warning("a task in the background is begun again: %s", reason(error))
            await anyio.sleep(AGAIN_AFTER)
        except Exception:
            logger.exception("a task in the background failed, and is begun again")
            await anyio.sleep(AGAIN_AFTER)


async def _follow(front: Front) -> None:
    """Count and log the jobs that end."""
    async for job in front.registry.finished():
        front.metrics.finished(job)
        if job.state == "complete" and job.started is not None and job.finished is not None:
            front.queue.took(job.finished - job.started)
        with about_job(job.id):
            seconds = (job.finished or job.created) - job.created
            logger.info("%s after %.2f s, %d pictures", job.state, seconds, job.images)


async def _retain(settings: Settings, store: Store) -> None:
    """Delete old jobs from time to time, where a limit is set."""
    if settings.keep_days is None and settings.keep_bytes is None:
        return
    seconds = None if settings.keep_days is None else settings.keep_days * 86400
    while True:
        deleted = await to_thread.run_sync(lambda: store.retain(seconds=seconds, total_bytes=settings.keep_bytes))
        if deleted:
            logger.info("deleted %d old jobs", deleted)
        await anyio.sleep(RETAIN_EVERY)


async def _beat(front: Front, url: str) -> None:
    async def beat() -> dict[str, Any]:
        return await _beat_data(front)

    await keep_beating(url, beat, lambda: front.worker.status in ("ready", "error"))


async def _beat_data(front: Front) -> dict[str, Any]:
    counts = await front.registry.counts()
    settings = front.settings
    return heartbeat(
        front.worker, worker_id=worker_name(settings), port=settings.port, running=counts.get("running", 0)
    )


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return answer(error, request.scope)


async def _on_storage(request: Request, error: Exception) -> Response:
    assert isinstance(error, StorageError)
    logger.warning("%s %r: %s", request.method, request.url.path, reason(error))
    return answer(storage_problem(error), request.scope)


async def _on_http(request: Request, error: Exception) -> Response:
    """What the router and the form parser raise."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    code, message = {
        404: ("not_found", "there is nothing at this path"),
        405: ("method_not_allowed", f"{request.method} is not for this path"),
        413: ("too_large", "the body is too large"),
    }.get(status, ("bad_request", str(error.detail)[:200]))
    return answer(ProblemError(status, code, message, headers=error.headers), request.scope)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it
