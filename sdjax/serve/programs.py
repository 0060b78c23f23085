"""Which batches are compiled, and how long a step of each takes: measured, so that batching pays where it is used."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from sdjax.devices.target import cores, local_target
from sdjax.errors import NotFiniteError
from sdjax.pipeline import Pipeline
from sdjax.serve import drawing
from sdjax.serve.drawing import Key, Row
from sdjax.serve.scheduling import SLICE_SECONDS, slice_length

BATCH_SIZES = (1, 2, 4, 8)
NEWEST = 0.25
"""Weight of the newest measurement in the mean of a step's time."""
FADING = 0.05
"""How far, at every measurement, the other sizes' means go back to their best: one that was slow once gets a turn."""
ROUNDS, ROUND_SECONDS = 3, 1.0
"""A step is measured so often after compiling, unless that takes too long, and after a run that doesn't count: the
first one of a program may take fifty times as long as those that follow."""

logger = logging.getLogger(__name__)


class UnwantedError(Exception):
    """Nobody waits any more for what was being compiled."""


class Speed(NamedTuple):
    """Seconds of a step: the mean of late, and the least ever."""

    mean: float
    least: float


def default_batch_sizes() -> tuple[int, ...]:
    """On a CPU each row is a call of its own, and as many run beside each other as there are cores."""
    return tuple(size for size in BATCH_SIZES if size <= cores()) if local_target().rows_one_by_one else BATCH_SIZES


class Programs:
    """The compiled batches by what their rows have in common. Any thread may ask; compiling goes on beside the loop."""

    def __init__(self, pipe: Pipeline, sizes: Sequence[int]) -> None:
        self.pipe = pipe
        self.sizes = tuple(sorted(sizes))
        self._guard = threading.Lock()
        self._speeds: dict[Any, dict[int, Speed]] = {}
        self._most: dict[Any, int] = {}

    def step_seconds(self, key: Key) -> Mapping[int, float]:
        """Of a whole batch, by its size; empty where none is compiled."""
        with self._guard:
            return {size: speed.mean for size, speed in self._speeds.get(key.shapes, {}).items()}

    def next_size(self, key: Key, rows: int) -> int | None:
        """The size to compile next, so that more of so many rows share a batch; None where that's done."""
        with self._guard:
            largest = max(self._speeds.get(key.shapes, {}), default=0)
            most = self._most.get(key.shapes, self.sizes[-1])
        larger = [size for size in self.sizes if largest < size <= most]
        return larger[0] if larger and largest < rows else None

    def compile(self, key: Key, row: Row, size: int, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Compile the loop for a batch size, and the decoder, and measure a step.

        Args:
            key: of the rows.
            row: any row of this key.
            size: of the batch.
            is_wanted: asked between the parts, none of which can be interrupted.

        Raises:
            UnwantedError: it isn't wanted any more; what was compiled so far serves the next attempt.
        """

        def check() -> None:
            if not is_wanted():
                raise UnwantedError

        check()
        began = time.perf_counter()
        drawing.walk(self.pipe, [row] * size, size, 0)
        check()
        with suppress(NotFiniteError):  # said of each picture, when there is one
            self.pipe.finish(row.request, drawing.latents(row) * 0)
        check()
        compiled = time.perf_counter()
        drawing.walk(self.pipe, [row] * size, size, 1)
        step, spent, calls = math.inf, 0.0, 1
        for _ in range(ROUNDS):
            check()
            start = time.perf_counter()
            drawing.walk(self.pipe, [row] * size, size, calls)
            took = time.perf_counter() - start
            step, spent = min(step, took / calls), spent + took
            if spent > ROUND_SECONDS:
                break
            # As many as the engine would make, or what is around them would count for more than it will.
            calls = slice_length(step, SLICE_SECONDS, (row.left,))
        logger.info("batches of %d compiled in %.1f s; a step takes %.1f ms", size, compiled - began, 1000 * step)
        with self._guard:
            self._speeds.setdefault(key.shapes, {})[size] = Speed(step, step)

    def measured(self, key: Key, size: int, seconds: float) -> None:
        """Learn what a step of a full batch took."""
        with self._guard:
            speeds = self._speeds.get(key.shapes, {})
            for known, speed in speeds.items():
                towards, share = (seconds, NEWEST) if known == size else (speed.least, FADING)
                speeds[known] = Speed(speed.mean + share * (towards - speed.mean), min(speed.least, towards))

    def too_large(self, key: Key, size: int) -> None:
        """There is no memory for this size: never again."""
        with self._guard:
            fitting = [smaller for smaller in self.sizes if smaller < size] or [size]
            self._most[key.shapes] = fitting[-1]
            self._speeds[key.shapes] = {
                known: speed for known, speed in self._speeds.get(key.shapes, {}).items() if known in fitting
            }
