"""Walk batches a slice further, and find whose fault it is when one fails."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sdjax.errors import NotFiniteError
from sdjax.serve import drawing
from sdjax.serve.drawing import Key, Row
from sdjax.serve.failures import is_out_of_memory
from sdjax.serve.programs import Programs
from sdjax.serve.scheduling import SLICE_SECONDS, slice_length
from sdjax.serve.stats import Tally

logger = logging.getLogger(__name__)


class Walk(NamedTuple):
    """What became of a row in a slice.

    before: the row that it was.
    after: where it is now; the same where `error` is set.
    error: why its picture can't be drawn.
    seconds: that the slice took.
    """

    before: Row
    after: Row
    error: Exception | None
    seconds: float


class Slices:
    """The slices of one engine.

    Args:
        programs: what is compiled, and how fast it is; it learns from every slice.
        tally: counts them.
        moved: called after each: a sign of life.
    """

    def __init__(self, programs: Programs, tally: Tally, moved: Callable[[], None]) -> None:
        self._programs = programs
        self._tally = tally
        self._moved = moved

    def walk(self, key: Key, rows: Sequence[Row], size: int, seconds: float, limits: Sequence[int]) -> list[Walk]:
        """Take rows of one key further, in a batch of `size`, for about so long.

        Args:
            key: of the rows.
            rows: at least one, at most `size`.
            size: of a batch that is compiled.
            seconds: that it may take.
            limits: calls of the network that each row may make before something is to be done about it.
        """
        try:
            return self._walk(key, rows, size, seconds, limits)
        except Exception as error:
            return self._walk_apart(key, rows, size, limits, error)

    def _walk(self, key: Key, rows: Sequence[Row], size: int, seconds: float, limits: Sequence[int]) -> list[Walk]:
        step_seconds = self._programs.step_seconds(key).get(size, SLICE_SECONDS)
        calls = slice_length(step_seconds, seconds, limits)
        began = time.perf_counter()
        after, finite = drawing.walk(self._programs.pipe, rows, size, calls)
        took = time.perf_counter() - began
        self._moved()
        self._tally.sliced(len(rows), size, calls, took)
        # Places that stand still may cost less, and a short slice is more of what is around the calls than of them.
        if len(rows) == size and took > SLICE_SECONDS / 2:
            self._programs.measured(key, size, took / calls)
        return [
            Walk(before, row, None, took) if is_finite else Walk(before, before, self._not_finite(before), took)
            for before, row, is_finite in zip(rows, after, finite, strict=True)
        ]

    def _walk_apart(
        self, key: Key, rows: Sequence[Row], size: int, limits: Sequence[int], error: Exception
    ) -> list[Walk]:
        """A batch failed: whose fault it is shows when each walks alone."""
        smallest = self._programs.sizes[0]
        if size == smallest and len(rows) == 1:
            return [Walk(row, row, error, 0.0) for row in rows]
        jobs = ", ".join(dict.fromkeys(row.job_id for row in rows))
        logger.warning("a batch failed, and its pictures are tried one by one: %s", error, extra={"job": jobs})
        if is_out_of_memory(error):
            self._programs.too_large(key, size)
        return [
            walk
            for row, limit in zip(rows, limits, strict=True)
            for walk in self.walk(key, [row], smallest, 0.0, [limit])
        ]

    def _not_finite(self, before: Row) -> NotFiniteError:
        step = drawing.first_step_not_finite(self._programs.pipe, before)
        picture = f"image {before.number} (seed {before.request.seeds[0]})"
        return NotFiniteError(f"{picture} became NaN or infinite in step {step} of {before.steps}")
