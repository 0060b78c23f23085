"""Numbers for Prometheus."""

import asyncio
import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import Scope

from sdjax.serve.stats import Stats
from sdjax.serve.store import Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LAGS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})

LAG_EVERY = 0.05
"""Seconds between two looks at how late the event loop is."""


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._numbers = CollectorRegistry()
        self._jobs = Gauge("sdjax_jobs", "Jobs in the store, by state.", ["state"], registry=self._numbers)
        self._depth = Gauge("sdjax_queue_depth", "Jobs that wait.", registry=self._numbers)
        self._finished = Counter("sdjax_jobs_finished", "Jobs that came to an end.", ["state"], registry=self._numbers)
        self._waited = self._histogram("sdjax_job_wait_seconds", "From submission to the first step.", SECONDS)
        self._ran = self._histogram("sdjax_job_run_seconds", "From the first step to the end.", SECONDS)
        self._phases = Histogram(
            "sdjax_job_phase_seconds",
            "What complete jobs spent, by phase: queued, prepare, denoise, decode, encode.",
            ["phase"],
            buckets=(0.005, 0.025, *SECONDS),
            registry=self._numbers,
        )
        self._images = Counter("sdjax_images", "Pictures drawn.", registry=self._numbers)
        self._engine = _EngineCollector()
        self._numbers.register(self._engine)
        self._memory = Gauge(
            "sdjax_device_memory_bytes",
            "Of each device: in_use, and peak and limit where its backend knows them.",
            ["device", "kind"],
            registry=self._numbers,
        )
        self._free = Gauge(
            "sdjax_storage_free_bytes", "What the disk of jobs and pictures has left.", registry=self._numbers
        )
        self._ready = Gauge("sdjax_ready", "1 while jobs are taken and drawn.", registry=self._numbers)
        self._requests = Counter(
            "sdjax_http_requests", "Requests answered.", ["method", "route", "status"], registry=self._numbers
        )
        self._lasted = self._histogram("sdjax_http_seconds", "Until an answer ended.", (0.005, 0.025, *SECONDS))
        self._open = Gauge("sdjax_http_open", "Requests under way, streams among them.", registry=self._numbers)
        self._lag = self._histogram("sdjax_event_loop_lag_seconds", "How late the event loop woke a task.", LAGS)
        ProcessCollector(registry=self._numbers)

    def text(
        self,
        counts: Mapping[str, int],
        stats: Stats | None,
        memory: Mapping[str, Mapping[str, int]],
        *,
        is_ready: bool,
        free_bytes: int | None = None,
    ) -> bytes:
        """All numbers in Prometheus' text format.

        Args:
            counts: jobs by state.
            stats: of the engine, once there is one.
            memory: bytes by device and kind, see `sdjax.serve.stats.device_memory`.
            is_ready: whether jobs are taken and drawn.
            free_bytes: that are left for pictures, where that is known.
        """
        if free_bytes is not None:
            self._free.set(free_bytes)
        for state, count in counts.items():
            self._jobs.labels(state).set(count)
        self._depth.set(counts.get("queued", 0))
        for device, kinds in memory.items():
            for kind, size in kinds.items():
                self._memory.labels(device, kind).set(size)
        self._engine.stats = stats
        self._ready.set(is_ready)
        return generate_latest(self._numbers)

    def finished(self, job: Job) -> None:
        """Count a job that came to its end."""
        self._finished.labels(job.state).inc()
        self._images.inc(job.images)
        for phase, seconds in job.timings.items():
            self._phases.labels(phase).observe(seconds)
        if job.started is not None and job.finished is not None:
            self._waited.observe(max(job.started - job.created, 0.0))
            self._ran.observe(max(job.finished - job.started, 0.0))

    def began(self, scope: Scope) -> Callable[[int], None]:
        """Count a request, by the route that answers it and never by the path that was asked for.

        Args:
            scope: of the request; its route is known when it is answered.

        Returns:
            A function to call with the answer's status.
        """
        at = time.monotonic()
        self._open.inc()

        def ended(status: int) -> None:
            self._open.dec()
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = getattr(scope.get("route"), "path", "none")
            self._requests.labels(method, route, str(status)).inc()
            self._lasted.observe(time.monotonic() - at)

        return ended

    async def watch_lag(self) -> None:
        """Measure for ever how much later than asked for the running event loop wakes a task."""
        while True:
            due = time.monotonic() + LAG_EVERY
            await asyncio.sleep(LAG_EVERY)
            self._lag.observe(max(time.monotonic() - due, 0.0))

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, buckets=buckets, registry=self._numbers)


class _EngineCollector(Collector):
    """What the engine counts by itself, under names of its own."""

    def __init__(self) -> None:
        self.stats: Stats | None = None

    def collect(self) -> list[CounterMetricFamily | GaugeMetricFamily]:
        """See prometheus_client."""
        if self.stats is None:
            return []
        stats = self.stats
        steps = GaugeMetricFamily(
            "sdjax_step_seconds", "A step of one picture, in the batch that serves it best.", labels=["bucket"]
        )
        for bucket, seconds in stats.step_seconds.items():
            steps.add_metric([bucket], seconds)
        return [
            GaugeMetricFamily("sdjax_slots", "Pictures that may be drawn at once.", value=stats.slots),
            GaugeMetricFamily("sdjax_drawing", "Pictures that are drawn.", value=stats.drawing),
            GaugeMetricFamily(
                "sdjax_batch_occupancy", "Share of the slots that are taken, 0 to 1.", value=stats.drawing / stats.slots
            ),
            GaugeMetricFamily(
                "sdjax_pending", "Pictures that are being prepared or wait for a slot.", value=stats.pending
            ),
            GaugeMetricFamily(
                "sdjax_finishing", "Jobs whose pictures are being encoded and stored.", value=stats.finishing
            ),
            GaugeMetricFamily(
                "sdjax_unstored", "Jobs whose end could not be stored, and is tried again.", value=stats.unstored
            ),
            CounterMetricFamily("sdjax_slices", "Slices of the loop.", value=stats.slices),
            CounterMetricFamily("sdjax_rows", "Pictures in those slices, each counted each time.", value=stats.rows),
            CounterMetricFamily("sdjax_row_places", "Places for them in those slices' batches.", value=stats.places),
            CounterMetricFamily("sdjax_steps", "Calls of the network by whole batches.", value=stats.steps),
            CounterMetricFamily("sdjax_slice_seconds", "Seconds that slices took.", value=stats.slice_seconds),
            CounterMetricFamily("sdjax_compiles", "Programs that were compiled.", value=stats.compiles),
            steps,
        ]
