"""From a leased job to one whose pictures can join a batch: its rows are made and its program is compiled. The engine's
thread alone calls it; the work is done on the threads of the preparer.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sdjax.serve.drawing import Key, Row
from sdjax.serve.preparer import Preparer
from sdjax.serve.programs import Programs
from sdjax.serve.store import Job
from sdjax.serve.work import Work, Works

KEPT_BUCKETS = 64
"""How many buckets' speeds are remembered."""
COMPILING_AT_ONCE = 4
"""Programs that first pictures wait for which are compiled at the same time."""


class Readiness:
    """Knows what is compiled, and has compiled what isn't.

    Args:
        programs: the batches.
        works: the jobs of this engine.
        wake: has the engine's thread look again, from any thread.

    Attributes:
        buckets: what the rows of a bucket have in common, for those that were drawn of late.
    """

    def __init__(self, programs: Programs, works: Works, wake: Callable[[], None]) -> None:
        self._programs = programs
        self._works = works
        self._wake = wake
        self._compiling: dict[Key, float] = {}
        self._firsts: set[Key] = set()
        self._done: dict[Key, Exception | None] = {}
        self._known: dict[tuple[str, str], None] = {}
        self.buckets: dict[str, Key] = {}

    def is_known(self, job: Job) -> bool:
        """Whether a job like it was drawn before, so that nothing has to be compiled for it."""
        return _kind(job) in self._known

    def prepared(self, job_id: str, key: Key, rows: list[Row], seconds: float) -> None:
        """The rows of a job are made."""
        work = self._works.live(job_id)
        if work is None:
            return
        work.seconds["prepare"] = seconds
        work.steps = rows[0].steps
        work.key = key
        work.rows = {row.number: row for row in rows}
        if self._programs.step_seconds(key):
            self._begin(work, key)
        else:
            work.phase = "compiling"

    def compile(self, preparer: Preparer) -> None:
        """Compile what jobs wait for, and larger batches for those that are drawn, one for each key at a time; and
        let the jobs go on whose program is there by now.
        """
        for done, error in list(self._done.items()):
            self._compiled(done, error)
            self._firsts.discard(done)
            del self._compiling[done], self._done[done]
        for work in self._works.in_phase("compiling"):
            key = work.key
            # Larger batches are compiled one after the other, and keep nobody waiting.
            is_busy = len(self._firsts & self._compiling.keys()) >= COMPILING_AT_ONCE
            if key is None or key in self._compiling or is_busy:
                continue
            self._firsts.add(key)
            row, is_wanted = next(iter(work.rows.values())), partial(self._is_waited_for, key)
            preparer.compile_first(key, row, is_wanted, partial(self._note, key))
            self._compiling[key] = time.perf_counter()
        for key, rows in self._works.active().items():
            size = self._programs.next_size(key, len(rows))
            if size is not None and key not in self._compiling:
                preparer.compile_larger(key, rows[0], size, partial(self._is_drawn, key), partial(self._note, key))
                self._compiling[key] = time.perf_counter()

    def _note(self, key: Key, error: Exception | None = None) -> None:
        """A thread that compiled for a key has ended."""
        self._done[key] = error
        self._wake()

    def _compiled(self, key: Key, error: Exception | None) -> None:
        """A program is there, or can't be; or it was given up, and is begun again where somebody waits by now."""
        for work in self._works.in_phase("compiling"):
            if work.key != key:
                continue
            if error is not None:
                work.error = error
            elif self._programs.step_seconds(key):
                work.seconds["prepare"] += time.perf_counter() - self._compiling[key]
                self._begin(work, key)

    def _begin(self, work: Work, key: Key) -> None:
        _remember(self._known, _kind(work.job), None)
        _remember(self.buckets, work.job.bucket, key)
        work.phase = "drawing"

    def _is_waited_for(self, key: Key) -> bool:
        return any(work.key == key for work in self._works.in_phase("compiling"))

    def _is_drawn(self, key: Key) -> bool:
        return key in self._works.active()


def _kind(job: Job) -> tuple[str, str]:
    """What decides which programs a job needs: those that read pictures have more."""
    return job.bucket, str(job.request.get("operation"))


def _remember(newest: dict[Any, Any], name: Any, value: Any) -> None:
    """Put an entry last, and forget the oldest ones."""
    newest.pop(name, None)
    newest[name] = value
    while len(newest) > KEPT_BUCKETS:
        del newest[next(iter(newest))]
