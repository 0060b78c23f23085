"""The pictures that have a slot: they join batches, walk slice by slice, and are decoded. For the engine's thread."""

import time
from collections.abc import Callable

from sdjax.pipeline import Pipeline
from sdjax.serve import drawing
from sdjax.serve.drawing import Row
from sdjax.serve.finisher import Finisher
from sdjax.serve.previews import Previews
from sdjax.serve.programs import Programs
from sdjax.serve.scheduling import SLICE_SECONDS, partition
from sdjax.serve.slices import Slices, Walk
from sdjax.serve.work import Works


class Batches:
    """Draws the jobs that are ready.

    Args:
        pipe: the model.
        programs: its compiled batches.
        works: the jobs of this engine.
        slices: walks rows.
        previews: of rows that are on their way.
        finisher: has a job once it is drawn, or has failed.
        slots: pictures that are drawn at once.
        tell: called between slices, with whether a picture is done: the store is told how far all are.
    """

    def __init__(
        self,
        pipe: Pipeline,
        programs: Programs,
        works: Works,
        slices: Slices,
        previews: Previews,
        finisher: Finisher,
        *,
        slots: int,
        tell: Callable[[bool], None],
    ) -> None:
        self._pipe = pipe
        self._programs = programs
        self._works = works
        self._slices = slices
        self._previews = previews
        self._finisher = finisher
        self._slots = slots
        self._tell = tell

    def join(self) -> None:
        """Give waiting pictures the free slots, in their order."""
        free = self._slots - sum(map(len, self._works.active().values()))
        for work, number in self._works.waiting():
            if free <= 0:
                return
            work.slots.add(number)
            free -= work.rows[number].left > 0

    def draw(self, seconds: float) -> None:
        """One slice for every batch, all of them in about so many seconds."""
        cuts = []
        for key, rows in self._works.active().items():
            for size in partition(len(rows), self._programs.step_seconds(key)):
                cuts.append((key, rows[:size], size))
                rows = rows[size:]
        for key, rows, size in cuts:
            live = [row for row in rows if self._works.live(row.job_id)]
            if not live:
                continue
            walks = self._slices.walk(key, live, size, seconds / len(cuts), list(map(self._limit, live)))
            for job_id in {row.job_id for row in live}:
                if work := self._works.live(job_id):
                    work.seconds["denoise"] += max(walk.seconds for walk in walks)
            for walk in walks:
                self._advance(walk)
            self._tell(not all(walk.after.left for walk in walks))

    def decode(self) -> None:
        """Turn what is walked into pictures; when others wait for the device, for no longer than a slice."""
        began = time.perf_counter()
        for row in self._works.walked():
            if self._works.active() and time.perf_counter() - began > SLICE_SECONDS:
                return
            work = self._works.live(row.job_id)
            if work is None:
                continue
            start = time.perf_counter()
            try:
                (picture,) = self._pipe.finish(row.request, drawing.latents(row))
            except Exception as error:
                work.error = error
                continue
            work.seconds["decode"] += time.perf_counter() - start
            work.drawn[row.number] = (row, picture)
            del work.rows[row.number]

    def finish(self) -> None:
        """Hand on the jobs whose pictures are all drawn, or that can't be."""
        for work in self._works.undrawn():
            if work.error is not None:
                self._finisher.fail(work, work.error)
            elif len(work.drawn) == work.pictures:
                self._finisher.finish(work)

    def _limit(self, row: Row) -> int:
        """How many calls a picture can go before something is to be done about it."""
        work = self._works.live(row.job_id)
        every = work.preview_every if work else 0
        return min(row.left, row.calls_to((row.done // every + 1) * every)) if every else row.left

    def _advance(self, walk: Walk) -> None:
        """Note how far a picture has come."""
        before, row = walk.before, walk.after
        work = self._works.live(row.job_id)
        if work is None:
            return
        if walk.error is not None:
            work.error = walk.error
            return
        work.rows[row.number] = row
        is_due = work.preview_every and row.done > before.done and row.done % work.preview_every == 0
        if is_due and row.number == 0 and row.left:
            preview = self._previews.picture(row)
            if preview is not None:
                self._finisher.preview(work.lease, work.progress(), preview)
