"""The engine: one thread that owns the device and draws the store's jobs, many at a time, one slice after another.

Pictures are rows of a batch, each at its own place in its own sampler (see `sdjax.generation.denoise`). After every
slice those that are done leave, those that wait join, cancelled ones are dropped, and the store hears how far all have
come. What may take long and isn't the loop has lanes of its own: preparing, compiling what was not foreseen, encoding.
They hand their results to the engine's thread, which alone knows what is going on.
"""

import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sdjax.errors import NotFiniteError
from sdjax.pipeline import Pipeline
from sdjax.serve import drawing
from sdjax.serve.drawing import Key, Row
from sdjax.serve.finisher import Finisher
from sdjax.serve.leases import Leases
from sdjax.serve.preparer import Preparer
from sdjax.serve.previews import Previews
from sdjax.serve.programs import Programs, default_batch_sizes
from sdjax.serve.scheduling import JOIN_SECONDS, SLICE_SECONDS, Blocked, admit, partition, slice_length
from sdjax.serve.stats import Compilations, Leased, Stats, Tally
from sdjax.serve.store import Store
from sdjax.serve.warmup import foreseen
from sdjax.serve.work import Work, error_code

LEASE_SECONDS = 15.0
POLL_SECONDS = 0.5
"""How often an idle engine looks for jobs that other processes submitted, or lost."""
TELL_SECONDS = 0.1
"""The store is told of progress, and asked for cancels, no more often than that: a slice may be shorter."""
STALLED_SECONDS = 1800.0
"""The longest that a compilation is believed to take. After that the device hangs, and the jobs are to be others'."""
STORING_SECONDS = 10.0
"""How long an engine that stops waits for pictures that are already drawn."""
KEPT_BUCKETS = 64
"""How many buckets' speeds are remembered."""

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
        native = pipe.definition.unet_config.sample_size * pipe.definition.vae_config.factor
        self._sizes = ((native, native),) if sizes is None else tuple(sizes)
        self._lease_seconds = lease_seconds
        self._programs = Programs(pipe, batch_sizes or default_batch_sizes())
        self.slots = slots or max(2, *self._programs.sizes)
        self._previews = Previews(pipe)
        self._compilations = Compilations()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._until: float | None = None
        self._works: dict[str, Work] = {}
        self._preparing: dict[str, int] = {}
        self._pending: deque[tuple[Key, Row]] = deque()
        self._active: dict[Key, list[Row]] = {}
        self._drawn: deque[Row] = deque()
        self._finishing: set[str] = set()
        self._compiling: set[Key] = set()
        self._blocked: Blocked | None = None
        self._alone = False
        self._leased_at = self._told_at = 0.0
        self._moved_at = time.monotonic()
        self._tally = Tally()
        self._buckets: dict[str, Key] = {}
        self._thread = threading.Thread(target=self._run, name="sdjax-engine", daemon=True)

    def start(self) -> None:
        """Begin: compile, then draw. Returns at once."""
        self._compilations.start()
        self._leases = Leases(
            self.store,
            owner=self._name,
            seconds=self._lease_seconds,
            is_alive=lambda: time.monotonic() - self._moved_at < STALLED_SECONDS,
            lost=partial(self._put, self._lost),
        )
        self._preparer = Preparer(
            self.store,
            self._programs,
            prepared=partial(self._put, self._prepared),
            failed=partial(self._put, self._fail),
        )
        self._finisher = Finisher(
            self.store, self._leases, model=self.pipe.name, finished=partial(self._put, self._finished)
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
        """Take no more jobs, give the running ones so long to finish, give the rest back to the store, and return."""
        is_first = self._until is None
        self._until = time.monotonic() + seconds
        self._wake.set()
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
        for bucket, key in list(self._buckets.items()):
            if known := self._programs.step_seconds(key):
                best[bucket] = min(seconds / size for size, seconds in known.items())
        works, tally = list(self._works.values()), self._tally
        return Stats(
            slots=self.slots,
            drawing=sum(map(len, list(self._active.values()))),
            pending=len(self._pending) + sum(list(self._preparing.values())),
            finishing=len(self._finishing),
            slices=tally.slices,
            rows=tally.rows,
            places=tally.places,
            steps=tally.steps,
            slice_seconds=tally.slice_seconds,
            compiles=self._compilations.count,
            ended=dict(tally.ended),
            step_seconds=best,
            leased={work.job.id: Leased(work.job.bucket, work.pictures, work.left) for work in works},
        )

    def _run(self) -> None:
        try:
            self._warm_up()
        except Exception as error:
            self.error = error
            return
        if self._until is None:
            self.ready.set()
        while self._until is None or not self._is_drained(self._until):
            try:
                self._turn()
            except Exception:
                # It is the store that fails, for what goes wrong with a job ends in its story: the disk may be full.
                logger.exception("a turn of the engine failed")
                time.sleep(POLL_SECONDS)

    def _warm_up(self) -> None:
        for row in foreseen(self.pipe, self._sizes):
            key = drawing.key(row, ())
            size: int | None = self._programs.sizes[0]
            while size is not None:
                try:
                    self._programs.compile(key, row, size)
                except Exception as error:
                    if size == self._programs.sizes[0] or error_code(error) != "out_of_memory":
                        raise
                    logger.warning("there is no memory for batches of %d: %s", size, error)
                    self._programs.too_large(key, size)
                self._moved_at = time.monotonic()
                size = self._programs.next_size(key, self.slots)
            self._previews.fit(row)

    def _is_drained(self, until: float) -> bool:
        """Give back what hasn't begun; True when the rest is done, or out of time."""
        for work in [work for work in self._works.values() if not work.began]:
            self._leases.give_back(work.lease)
            self._forget(work.job.id, "released")
        return not self._works or time.monotonic() > until

    def _turn(self) -> None:
        self._moved_at = time.monotonic()
        self._wake.clear()
        self._listen()
        if self._until is None:
            self._lease()
        self._join()
        if self._active or self._drawn:
            self._draw()
            self._decode()
        else:
            self._wake.wait(POLL_SECONDS)

    def _put(self, told: Callable[..., None], *about: Any) -> None:
        """Tell the engine's thread something, from any other."""
        self._inbox.put(partial(told, *about))
        self._wake.set()

    def _listen(self) -> None:
        while not self._inbox.empty():
            self._inbox.get_nowait()()

    def _lease(self) -> None:
        """Fill free slots from the queue.

        A job that was drawn by a process that died is suspected of its death, and drawn alone: should the process die
        again, no other job is blamed for it.
        """
        while self._taken() < self.slots and len(self._finishing) <= self.slots:
            if self._alone and (self._works or self._finishing):
                return
            self._alone = False
            waiting = list(self.store.waiting())
            running = {work.job.bucket for work in self._works.values()}
            bucket, self._blocked = admit(waiting, running, self._blocked, time.monotonic())
            if bucket is None and (waiting or self._works):
                return
            # An idle engine asks also when nobody waits, for asking is what brings lost jobs back.
            lease = self._leases.take(bucket)
            if lease is None:
                return
            job = lease.job
            self._alone = job.attempts > 1
            if self._alone and (self._works or self._finishing):
                self._leases.give_back(lease)
                return
            work = Work(lease, job.request.get("num_images") or 1)
            # The clock on the wall may be set back in between.
            work.seconds["queued"] = max((job.started or job.created) - job.created, 0.0)
            self._works[job.id] = work
            self._preparing[job.id] = work.pictures
            self._leased_at = time.monotonic()
            self._preparer.prepare(lease)

    def _taken(self) -> int:
        return sum(self._preparing.values()) + len(self._pending) + sum(map(len, self._active.values()))

    def _prepared(self, job_id: str, key: Key, rows: list[Row], seconds: float) -> None:
        self._preparing.pop(job_id, None)
        work = self._works.get(job_id)
        if work is None:
            return
        work.seconds["prepare"] = seconds
        work.steps = rows[0].steps
        self._buckets.pop(work.job.bucket, None)
        self._buckets[work.job.bucket] = key
        if len(self._buckets) > KEPT_BUCKETS:
            del self._buckets[next(iter(self._buckets))]
        self._pending.extend((key, row) for row in rows)

    def _join(self) -> None:
        """Give pending pictures the free slots, in their order."""
        while self._pending and sum(map(len, self._active.values())) < self.slots:
            key, row = self._pending.popleft()
            self._works[row.job_id].began = True
            if row.left:
                self._active.setdefault(key, []).append(row)
            else:
                self._drawn.append(row)
        for key, rows in self._active.items():
            size = self._programs.next_size(key, len(rows))
            if size is not None and key not in self._compiling:
                self._compiling.add(key)
                self._preparer.compile(key, rows[0], size, partial(self._put, self._compiling.discard, key))

    def _draw(self) -> None:
        """One slice for every batch, all of them in a time that leaves the device in reach.

        A job that was just leased is about to join: what draws meanwhile must not keep its slot empty for long.
        """
        is_joined_soon = self._preparing and time.monotonic() - self._leased_at < SLICE_SECONDS
        seconds = JOIN_SECONDS if is_joined_soon else SLICE_SECONDS
        cuts = [
            (key, size)
            for key, rows in self._active.items()
            for size in partition(len(rows), self._programs.step_seconds(key))
        ]
        before, self._active = self._active, {key: [] for key in self._active}
        for key, size in cuts:
            batch, before[key] = before[key][:size], before[key][size:]
            after = self._slice(key, batch, size, seconds / len(cuts))
            self._active[key] += [row for row in after if row.left]
            ends = [row for row in after if not row.left]
            self._drawn.extend(ends)
            self._tell(every=0.0 if ends else TELL_SECONDS)
        self._active = {
            key: live for key, rows in self._active.items() if (live := [r for r in rows if r.job_id in self._works])
        }

    def _slice(self, key: Key, rows: list[Row], size: int, seconds: float) -> list[Row]:
        """Take rows further; gives those whose jobs go on."""
        rows = [row for row in rows if row.job_id in self._works]
        if not rows:
            return []
        step_seconds = self._programs.step_seconds(key).get(size, SLICE_SECONDS)
        calls = slice_length(step_seconds, seconds, map(self._limit, rows))
        began = time.perf_counter()
        try:
            after, finite = drawing.walk(self.pipe, rows, size, calls)
        except Exception as error:
            return self._walk_apart(key, rows, size, error)
        took = time.perf_counter() - began
        self._moved_at = time.monotonic()
        self._tally.sliced(len(rows), size, calls, took)
        # Places that stand still may cost less, and a short slice is more of what is around the calls than of them.
        if len(rows) == size and took > SLICE_SECONDS / 2:
            self._programs.measured(key, size, took / calls)
        for job_id in {row.job_id for row in rows}:
            self._works[job_id].seconds["denoise"] += took
        return [row for i, row in enumerate(after) if self._goes_on(rows[i], row, is_finite=finite[i])]

    def _limit(self, row: Row) -> int:
        """How many calls a picture can go before something is to be done about it."""
        every = self._works[row.job_id].preview_every
        return min(row.left, row.calls_to((row.done // every + 1) * every)) if every else row.left

    def _walk_apart(self, key: Key, rows: list[Row], size: int, error: Exception) -> list[Row]:
        """A batch failed: whose fault it is shows when each walks alone."""
        smallest = self._programs.sizes[0]
        if size == smallest:
            for row in rows:
                self._fail(row.job_id, error)
            return []
        jobs = ", ".join(dict.fromkeys(row.job_id for row in rows))
        logger.warning("a batch failed, and its pictures are tried one by one: %s", error, extra={"job": jobs})
        if error_code(error) == "out_of_memory":
            self._programs.too_large(key, size)
        return [after for row in rows for after in self._slice(key, [row], smallest, 0.0)]

    def _goes_on(self, before: Row, row: Row, *, is_finite: bool) -> bool:
        """Note how far a picture has come; False when its job has failed."""
        work = self._works.get(row.job_id)
        if work is None:
            return False
        if not is_finite:
            step = drawing.first_step_not_finite(self.pipe, before)
            picture = f"image {row.number} (seed {row.request.seeds[0]})"
            self._fail(row.job_id, NotFiniteError(f"{picture} became NaN or infinite in step {step} of {row.steps}"))
            return False
        work.done[row.number] = row.done
        is_due = work.preview_every and row.done > before.done and row.done % work.preview_every == 0
        if is_due and row.number == 0 and row.left:
            preview = self._previews.picture(row)
            if preview is not None:
                self._finisher.preview(work.lease, work.progress(), preview)
        return True

    def _tell(self, *, every: float) -> None:
        """Tell the store what is new, and hear which jobs are lost, unless that was done in the last seconds."""
        if time.monotonic() - self._told_at < every:
            return
        events = {}
        for job_id, work in self._works.items():
            progress = work.progress()
            if progress["step"] > work.told:
                work.told = progress["step"]
                events[job_id] = [("progress", progress)]
        self._told_at = time.monotonic()
        self._leases.tell(events)
        self._listen()

    def _decode(self) -> None:
        """Turn what is done into pictures; when others wait for the device, for no longer than a slice."""
        began = time.perf_counter()
        while self._drawn and not (self._active and time.perf_counter() - began > SLICE_SECONDS):
            row = self._drawn.popleft()
            work = self._works.get(row.job_id)
            if work is None:
                continue
            start = time.perf_counter()
            try:
                (picture,) = self.pipe.finish(row.request, drawing.latents(row))
            except Exception as error:
                self._fail(row.job_id, error)
                continue
            work.drawn[row.number] = (row, picture)
            work.seconds["decode"] += time.perf_counter() - start
            if len(work.drawn) == work.pictures:
                del self._works[row.job_id]
                self._finishing.add(row.job_id)
                self._finisher.finish(work)

    def _finished(self, work: Work, how: str) -> None:
        self._finishing.discard(work.job.id)
        self._tally.ended[how] += 1

    def _fail(self, job_id: str, error: Exception) -> None:
        """End one job as an error; the others don't notice."""
        work = self._works.get(job_id)
        if work is None:
            return
        if error_code(error) == "internal":
            logger.error("failed", exc_info=error, extra={"job": job_id})
        self._forget(job_id, "error")
        self.store.fail(job_id, work.lease.fence, error_code(error), str(error) or type(error).__name__)

    def _lost(self, job_id: str) -> None:
        """It was cancelled, or is another's."""
        if job_id in self._works:
            self._forget(job_id, "gone")

    def _forget(self, job_id: str, how: str) -> None:
        """Draw it no further. What of it is in the batches leaves them at their next slice."""
        self._leases.end(job_id)
        del self._works[job_id]
        self._preparing.pop(job_id, None)
        self._pending = deque((key, row) for key, row in self._pending if row.job_id != job_id)
        self._tally.ended[how] += 1
