"""The engine: one thread that owns the device and draws the store's jobs, many at a time, one slice after another.

Pictures are rows of a batch, each at its own place in its own sampler (see `sdjax.generation.denoise`). After every
slice those that are done leave, those that wait join, cancelled ones are dropped, and the store learns how far all have
come. What may take long and isn't the loop has threads of its own: preparing, compiling what was not foreseen, encoding
and storing. They hand their results to the engine's thread, which alone changes what it knows of its jobs.

A job that is leased is in exactly one phase of `Work`, and its pictures are nowhere else. Each turn asks the jobs what
is to be done next, so that a turn that fails anywhere is simply taken again. A store that fails delays what has to be
written or leased, and nothing else; what keeps failing for another reason ends the jobs that it keeps from going on.
"""

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sdjax.pipeline import Pipeline
from sdjax.serve import drawing
from sdjax.serve.batches import Batches
from sdjax.serve.failures import is_out_of_memory
from sdjax.serve.finisher import Finisher
from sdjax.serve.intake import Intake
from sdjax.serve.leases import Leases
from sdjax.serve.patience import Patience
from sdjax.serve.preparer import Preparer
from sdjax.serve.previews import Previews
from sdjax.serve.programs import Programs, UnwantedError, default_batch_sizes
from sdjax.serve.readiness import Readiness
from sdjax.serve.scheduling import JOIN_SECONDS, SLICE_SECONDS
from sdjax.serve.slices import Slices
from sdjax.serve.stats import Compilations, Leased, Stats, Tally
from sdjax.serve.store import Store
from sdjax.serve.warmup import foreseen
from sdjax.serve.work import How, Works

LEASE_SECONDS = 15.0
POLL_SECONDS = 0.5
"""How often an idle engine looks for jobs that other processes submitted, or lost."""
TELL_SECONDS = 0.1
"""The store is told of progress, and asked for cancels, no more often than that: a slice may be shorter."""
STALLED_SECONDS = 1800.0
"""The longest that a compilation is believed to take. After that the device hangs, and the jobs are to be others'."""
STORING_SECONDS = 10.0
"""How long an engine that stops waits for pictures that are already drawn."""
FAILED_TURNS = 20
"""So many turns in a row may fail before the jobs that are drawn end: they would be drawn for ever."""

logger = logging.getLogger(__name__)


class GenerationEngine:
    """Draws what waits in a store, from `start` to `drain`.

    Args:
        pipe: the model.
        store: the jobs.
        name: of this engine, for the store's records.
        slots: how many pictures are drawn at once; None is as many as the largest batch holds, and at least two, so
            that a short job needn't wait for a long one. Where batches gain nothing, more of them make everybody slower
            (`benchmarks/serving.py`).
        batch_sizes: to compile; None lets the backend decide. Of those, each slice takes what was measured to be best.
        sizes: (width, height) in pixels to compile before the engine is ready; None is the model's own.
        lease_seconds: after which a dead engine's jobs are others'.

    Attributes:
        ready: set once everything foreseen is compiled and jobs are taken.
        error: what kept it from getting ready.
    """

    def __init__(
        self,
        pipe: Pipeline,
        store: Store,
        *,
        name: str | None = None,
        slots: int | None = None,
        batch_sizes: Sequence[int] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.pipe = pipe
        self.store = store
        self.ready = threading.Event()
        self.error: Exception | None = None
        self._name = name or f"{socket.gethostname()}:{os.getpid()}"
        self._sizes = (pipe.definition.native_size,) if sizes is None else tuple(sizes)
        self._lease_seconds = lease_seconds
        self._programs = Programs(pipe, batch_sizes or default_batch_sizes())
        self.slots = slots or max(2, *self._programs.sizes)
        self._previews = Previews(pipe)
        self._compilations = Compilations()
        self._inbox: deque[tuple[str, Callable[[], None]]] = deque()
        self._wake = threading.Event()
        self._until: float | None = None
        self._works = Works()
        self._patience = Patience()
        self._told_at = 0.0
        self._tally = Tally()
        self._moved()
        self._thread = threading.Thread(target=self._run, name="sdjax-engine", daemon=True)

    def start(self) -> None:
        """Begin: compile, then draw. Returns at once."""
        self._compilations.start()
        self._leases = Leases(
            self.store,
            owner=self._name,
            seconds=self._lease_seconds,
            is_alive=lambda: time.monotonic() - self._moved_at < STALLED_SECONDS,
            lost=self._wake.set,
        )
        self._preparer = Preparer(
            self.store,
            self._programs,
            prepared=lambda job_id, *made: self._put(job_id, self._readiness.prepared, job_id, *made),
            failed=lambda job_id, error: self._put(job_id, self._fail, job_id, error),
        )
        self._finisher = Finisher(self.store, self._leases, model=self.pipe.name, wake=self._wake.set)
        self._readiness = Readiness(self._programs, self._works, self._wake.set)
        self._intake = Intake(
            self.store,
            self._leases,
            self._works,
            self._preparer,
            self._finisher,
            self._readiness,
            slots=self.slots,
            patience=self._patience,
        )
        self._batches = Batches(
            self.pipe,
            self._programs,
            self._works,
            Slices(self._programs, self._tally, self._moved),
            self._previews,
            self._finisher,
            slots=self.slots,
            tell=lambda is_done: self._tell(0.0 if is_done else TELL_SECONDS),
        )
        self._unsubscribe = self.store.subscribe(lambda _: self._wake.set())
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Return when jobs are taken, or when it was drained before.

        Raises:
            Exception: whatever kept it from getting ready, `error`.
        """
        while self._until is None and not self.ready.wait(0.1):
            if self.error is not None:
                raise self.error

    def drain(self, seconds: float) -> None:
        """Take no more jobs, give the running ones so long to finish, give the rest back to the store, and return.

        A compilation can't be interrupted, and isn't waited for.
        """
        is_first = self._until is None
        self._until = time.monotonic() + seconds
        self._wake.set()
        if self.ready.is_set():
            self._thread.join(seconds + 2 * SLICE_SECONDS)
        if is_first:
            self._unsubscribe()
            self._preparer.close()
            self._finisher.close(STORING_SECONDS)
            self._leases.close()
            self._compilations.stop()

    def stats(self) -> Stats:
        """What it has done so far."""
        best = {}
        for bucket, key in list(self._readiness.buckets.items()):
            if known := self._programs.step_seconds(key):
                best[bucket] = min(seconds / size for size, seconds in known.items())
        works, tally = self._works, self._tally
        undrawn = works.undrawn()
        return Stats(
            slots=self.slots,
            drawing=sum(map(len, works.active().values())),
            pending=sum(work.pictures for work in undrawn if work.phase != "drawing") + len(works.waiting()),
            finishing=len(works.in_phase("ending")),
            slices=tally.slices,
            rows=tally.rows,
            places=tally.places,
            steps=tally.steps,
            slice_seconds=tally.slice_seconds,
            compiles=self._compilations.count,
            ended=dict(tally.ended),
            step_seconds=best,
            leased={work.job.id: Leased(work.job.bucket, work.pictures, work.left) for work in undrawn},
            unstored=self._finisher.unstored,
        )

    def _run(self) -> None:
        try:
            self._warm_up()
        except UnwantedError:
            return
        except Exception as error:
            self.error = error
            return
        if self._until is None:
            self.ready.set()
        errors: list[Exception] = []
        while self._until is None or (self._works and time.monotonic() < self._until):
            try:
                if errors and len(errors) % FAILED_TURNS == 0:
                    self._give_up(errors)
                self._turn()
                errors = []
            except Exception as error:
                errors.append(error)
                logger.exception("a turn of the engine failed")
                time.sleep(POLL_SECONDS)

    def _give_up(self, errors: list[Exception]) -> None:
        """End all jobs, for none of them goes on; or, where that fails too, let their leases run out."""
        if len(errors) == FAILED_TURNS:
            for work in self._works.undrawn():
                work.error = errors[-1]
            self._batches.finish()
            return
        for work in self._works:
            self._leases.end(work.job.id)
            self._works.remove(work.job.id)

    def _warm_up(self) -> None:
        def is_wanted() -> bool:
            return self._until is None

        for row in foreseen(self.pipe, self._sizes):
            key = drawing.key(row)
            size: int | None = self._programs.sizes[0]
            while size is not None:
                try:
                    self._programs.compile(key, row, size, is_wanted)
                except Exception as error:
                    if size == self._programs.sizes[0] or not is_out_of_memory(error):
                        raise
                    logger.warning("there is no memory for batches of %d: %s", size, error)
                    self._programs.too_large(key, size)
                self._moved()
                size = self._programs.next_size(key, self.slots)
            self._previews.fit(row)

    def _turn(self) -> None:
        self._moved()
        self._wake.clear()
        self._listen()
        if self._until is None:
            self._intake.fill()
        else:
            self._intake.give_back()
        self._batches.finish()
        self._batches.join()
        self._readiness.compile(self._preparer)
        if self._works.active() or self._works.walked():
            # A job that was just leased is about to join: what draws meanwhile mustn't keep its slot empty for long.
            is_joined_soon = self._works.in_phase("preparing", "compiling") and (
                time.monotonic() - self._intake.leased_at < SLICE_SECONDS
            )
            self._batches.draw(JOIN_SECONDS if is_joined_soon else SLICE_SECONDS)
            self._batches.decode()
            self._batches.finish()
        else:
            self._tell(POLL_SECONDS)
            self._wake.wait(POLL_SECONDS)

    def _moved(self) -> None:
        self._moved_at = time.monotonic()

    def _put(self, job_id: str, told: Callable[..., None], *about: Any) -> None:
        """Have the engine's thread do something, from any other; where it fails, the job that it is about fails."""
        self._inbox.append((job_id, partial(told, *about)))
        self._wake.set()

    def _listen(self) -> None:
        """Do what other threads asked for, and drop the jobs whose leases are lost."""
        while self._inbox:
            job_id, told = self._inbox[0]
            try:
                told()
            except Exception as error:
                self._fail(job_id, error)
            self._inbox.popleft()
        self._intake.reconcile(self._count)

    def _tell(self, every: float) -> None:
        """Tell the store what is new, and learn which jobs are lost, unless that was done in the last seconds."""
        if time.monotonic() - self._told_at < every or not self._works or not self._patience.is_over:
            return
        self._told_at = time.monotonic()
        told = {work.job.id: (work, work.progress()) for work in self._works.undrawn()}
        news = {job_id: progress for job_id, (work, progress) in told.items() if progress["step"] > work.told}
        try:
            self._leases.tell({job_id: [("progress", progress)] for job_id, progress in news.items()})
        except Exception as error:
            self._patience.failed(error)
            return
        self._patience.worked()
        for job_id, progress in news.items():
            told[job_id][0].told = progress["step"]
        self._listen()

    def _fail(self, job_id: str, error: Exception) -> None:
        if work := self._works.live(job_id):
            work.error = error

    def _count(self, how: How) -> None:
        self._tally.ended[how] += 1
