"""What those who run a server look at: health, readiness, numbers, the API's description."""

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from sdjax.serve.docs_page import docs_page
from sdjax.serve.front import front_of
from sdjax.serve.metrics import CONTENT_TYPE
from sdjax.serve.openapi import document
from sdjax.serve.routes import by_method
from sdjax.serve.stats import device_memory


async def health(request: Request) -> Response:
    """`GET /health`: the process lives."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """`GET /ready`: 200 once the model is loaded and compiled, 503 before that and while the server drains."""
    worker = front_of(request).worker
    is_ready = worker.status == "ready"
    body = {"status": worker.status, "model": worker.model.name if worker.model else None}
    return JSONResponse(body, 200 if is_ready else 503, headers={} if is_ready else {"Retry-After": "2"})


async def metrics(request: Request) -> Response:
    """`GET /metrics`, for Prometheus."""
    front = front_of(request)
    counts = await front.registry.counts()
    engine, is_ready = front.worker.engine, front.worker.status == "ready"
    if engine is None:
        text = front.metrics.text(counts, None, {}, is_ready=is_ready)
    else:
        memory = await to_thread.run_sync(device_memory)
        text = front.metrics.text(counts, engine.stats(), memory, is_ready=is_ready)
    return Response(text, media_type=CONTENT_TYPE)


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
