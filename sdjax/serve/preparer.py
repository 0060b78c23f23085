"""From a lease to rows that can join a batch, beside the loop: nobody who is being drawn waits for it."""

import time
from collections.abc import Callable
from functools import partial

import jax

from sdjax.serve import drawing
from sdjax.serve.drawing import Key, Row
from sdjax.serve.lanes import Lane
from sdjax.serve.logs import about_job
from sdjax.serve.programs import Programs, logger
from sdjax.serve.store import Lease, Store

Prepared = Callable[[str, Key, list[Row], float], None]
"""Called with a job, what its rows have in common, the rows, and the seconds that it took."""


class Preparer:
    """Two lanes: one makes rows, the other compiles what a job needs and nobody foresaw.

    Args:
        store: has the pictures that jobs start from.
        programs: what is compiled.
        prepared: called on these lanes.
        failed: likewise, with a job and why it can't be drawn.
    """

    def __init__(
        self, store: Store, programs: Programs, *, prepared: Prepared, failed: Callable[[str, Exception], None]
    ) -> None:
        self._store = store
        self._programs = programs
        self._prepared = prepared
        self._failed = failed
        self._preparing, self._compiling = Lane("sdjax-prepare"), Lane("sdjax-compile")

    def prepare(self, lease: Lease) -> None:
        """Make the rows of a job."""

        def prepare() -> None:
            with about_job(lease.job.id):
                self._prepare(lease)

        self._preparing.do(prepare)

    def compile(self, key: Key, row: Row, size: int, done: Callable[[], None]) -> None:
        """Compile a larger batch; the smaller ones serve meanwhile, and for good where it can't be."""
        self._compiling.do(partial(self._compile, key, row, size, done))

    def close(self) -> None:
        """Take no more; what is under way isn't waited for."""
        self._preparing.close(0.0)
        self._compiling.close(0.0)

    def _prepare(self, lease: Lease) -> None:
        job, pipe = lease.job, self._programs.pipe
        began = time.perf_counter()
        try:
            asked = drawing.requests(pipe, self._store, job.request)
            rows = [drawing.prepare(pipe, job.id, i, request) for i, request in enumerate(asked)]
            for leaf in jax.tree.leaves([row.batch for row in rows]):
                leaf.block_until_ready()
            key = drawing.key(rows[0], job.request.get("loras") or ())
        except Exception as error:
            self._failed(job.id, error)
            return
        seconds = time.perf_counter() - began
        if self._programs.step_seconds(key):
            self._prepared(job.id, key, rows, seconds)
        else:
            self._compiling.do(partial(self._compile_for, job.id, key, rows, seconds))

    def _compile_for(self, job_id: str, key: Key, rows: list[Row], seconds: float) -> None:
        began = time.perf_counter()
        try:
            if not self._programs.step_seconds(key):
                self._programs.compile(key, rows[0], self._programs.sizes[0])
        except Exception as error:
            self._failed(job_id, error)
            return
        self._prepared(job_id, key, rows, seconds + time.perf_counter() - began)

    def _compile(self, key: Key, row: Row, size: int, done: Callable[[], None]) -> None:
        try:
            self._programs.compile(key, row, size)
        except Exception as error:
            logger.warning("batches of %d could not be compiled: %s", size, error)
            self._programs.too_large(key, size)
        done()
