"""Numbers for Prometheus."""

import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.serve.stats import Stats
from sdjax.serve.store import Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._numbers = CollectorRegistry()
        self._jobs = Gauge("sdjax_jobs", "Jobs in the store.", ["state"], registry=self._numbers)
        self._finished = Counter("sdjax_jobs_finished", "Jobs that came to an end.", ["state"], registry=self._numbers)
        self._waited = self._histogram("sdjax_job_wait_seconds", "From submission to the first step.", SECONDS)
        self._ran = self._histogram("sdjax_job_run_seconds", "From the first step to the end.", SECONDS)
        self._images = Counter("sdjax_images", "Pictures drawn.", registry=self._numbers)
        self._engine = Gauge("sdjax_engine", "The engine, see `sdjax.serve.stats`.", ["what"], registry=self._numbers)
        self._phases = Gauge("sdjax_engine_seconds", "Of complete jobs, by phase.", ["phase"], registry=self._numbers)
        self._ready = Gauge("sdjax_ready", "1 while jobs are taken and drawn.", registry=self._numbers)
        self._requests = Counter(
            "sdjax_http_requests", "Requests answered.", ["method", "route", "status"], registry=self._numbers
        )
        self._lasted = self._histogram("sdjax_http_seconds", "Until an answer ended.", (0.005, 0.025, *SECONDS))
        self._open = Gauge("sdjax_http_open", "Requests under way, streams among them.", registry=self._numbers)

    def text(self, counts: Mapping[str, int], stats: Stats | None, *, is_ready: bool) -> bytes:
        """All numbers in Prometheus' text format.

        Args:
            counts: jobs by state.
            stats: of the engine, once there is one.
            is_ready: whether jobs are taken and drawn.
        """
        for state, count in counts.items():
            self._jobs.labels(state).set(count)
        if stats is not None:
            for what in ("slots", "drawing", "pending", "finishing", "slices", "compiles"):
                self._engine.labels(what).set(getattr(stats, what))
            for phase, seconds in stats.seconds.items():
                self._phases.labels(phase).set(seconds)
        self._ready.set(is_ready)
        return generate_latest(self._numbers)

    def finished(self, job: Job) -> None:
        """Count a job that came to its end."""
        self._finished.labels(job.state).inc()
        self._images.inc(job.images)
        if job.started is not None and job.finished is not None:
            self._waited.observe(max(job.started - job.created, 0.0))
            self._ran.observe(max(job.finished - job.started, 0.0))

    def began(self) -> Callable[[str, str, int], None]:
        """Count a request, and give what to call with method, route and status when it is answered."""
        at = time.monotonic()
        self._open.inc()

        def ended(method: str, route: str, status: int) -> None:
            self._open.dec()
            self._requests.labels(method, route, str(status)).inc()
            self._lasted.observe(time.monotonic() - at)

        return ended

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, buckets=buckets, registry=self._numbers)


class Counted:
    """Count requests by the route that answered them, never by the path that was asked for."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ended = self.metrics.began()
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            ended(scope["method"] if scope["method"] in METHODS else "other", route, status)


METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})
