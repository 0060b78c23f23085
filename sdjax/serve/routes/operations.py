"""What those who run a server look at: health, readiness, numbers, the API's description."""

from contextlib import suppress

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from sdjax.serve.docs_page import docs_page
from sdjax.serve.front import Front, front_of
from sdjax.serve.metrics import CONTENT_TYPE
from sdjax.serve.openapi import document
from sdjax.serve.routes import by_method
from sdjax.serve.stats import device_memory
from sdjax.serve.storage import StorageError


async def health(request: Request) -> Response:
    """`GET /health`: the process lives."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """`GET /ready`: 200 once the model is loaded and compiled; 503 before that, while the server drains, and while
    nothing can be stored, with the reason.
    """
    front = front_of(request)
    worker = front.worker
    body: dict[str, str | None] = {"status": worker.status, "model": worker.model.name if worker.model else None}
    reason = await _storage_failure(front) if worker.status == "ready" else None
    if reason is not None:
        body |= {"status": "storage_failed", "reason": reason}
    is_ready = body["status"] == "ready"
    return JSONResponse(body, 200 if is_ready else 503, headers={} if is_ready else {"Retry-After": "2"})


async def metrics(request: Request) -> Response:
    """`GET /metrics`, for Prometheus."""
    front = front_of(request)
    counts: dict[str, int] = {}
    free: int | None = None
    with suppress(StorageError):  # `sdjax_ready` shows it
        free = await front.registry.free_bytes()
        counts = await front.registry.counts()
    engine = front.worker.engine
    is_ready = front.worker.status == "ready" and await _storage_failure(front) is None
    memory = {} if engine is None else await to_thread.run_sync(device_memory)
    stats = None if engine is None else engine.stats()
    text = front.metrics.text(counts, stats, memory, is_ready=is_ready, free_bytes=free)
    return Response(text, media_type=CONTENT_TYPE)


async def _storage_failure(front: Front) -> str | None:
    """Why nothing can be stored now: the store fails, or it did, and still owes the engine an end."""
    failure = await front.registry.storage_failure()
    if failure is None and front.worker.engine is not None and (unstored := front.worker.engine.stats().unstored):
        return f"{unstored} jobs wait until their end can be stored"
    return failure


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`."""
    root = request.scope["root_path"]
    return JSONResponse({**document(), "servers": [{"url": root}]} if root else document())


async def docs(request: Request) -> Response:
    """`GET /docs`: the same for people. It asks no other host for anything."""
    policy = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    return HTMLResponse(docs_page(document()), headers={"Content-Security-Policy": policy})


ROUTES = [
    by_method("/health", GET=health),
    by_method("/ready", GET=ready),
    by_method("/metrics", GET=metrics),
    by_method("/openapi.json", GET=openapi),
    by_method("/docs", GET=docs),
]
