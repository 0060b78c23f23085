"""Which batches are compiled, and how long a step of each takes: measured, so that batching pays where it is used."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from sdjax.backend import cores, one_by_one
from sdjax.errors import NotFiniteError
from sdjax.pipeline import Pipeline
from sdjax.serve import drawing
from sdjax.serve.drawing import Key, Row

BATCH_SIZES = (1, 2, 4, 8)
NEWEST = 0.25
"""Weight of the newest measurement in the mean of a step's time."""
ROUNDS, ROUND_SECONDS = 3, 1.0
"""A step is measured so often after compiling, unless that takes too long: the first run of a program is slower."""

logger = logging.getLogger(__name__)


def default_batch_sizes() -> tuple[int, ...]:
    """On a CPU each row is a call of its own, and as many run beside each other as there are cores."""
    return tuple(size for size in BATCH_SIZES if size <= cores()) if one_by_one() else BATCH_SIZES


class Programs:
    """The compiled batches by what their rows have in common. Any thread may ask; compiling goes on beside the loop."""

    def __init__(self, pipe: Pipeline, sizes: Sequence[int]) -> None:
        self.pipe = pipe
        self.sizes = tuple(sorted(sizes))
        self._guard = threading.Lock()
        self._seconds: dict[Any, dict[int, float]] = {}
        self._most: dict[Any, int] = {}

    def step_seconds(self, key: Key) -> Mapping[int, float]:
        """Of a whole batch, by its size; empty where none is compiled."""
        with self._guard:
            return dict(self._seconds.get(key.shapes, {}))

    def next_size(self, key: Key, rows: int) -> int | None:
        """The size to compile next, so that more of so many rows share a batch; None where that's done."""
        with self._guard:
            largest = max(self._seconds.get(key.shapes, {}), default=0)
            most = self._most.get(key.shapes, self.sizes[-1])
        larger = [size for size in self.sizes if largest < size <= most]
        return larger[0] if larger and largest < rows else None

    def compile(self, key: Key, row: Row, size: int) -> None:
        """Compile the loop for a batch size, and the decoder, and measure a step. The row may be any of this key."""
        began = time.perf_counter()
        drawing.walk(self.pipe, [row] * size, size, 0)
        with suppress(NotFiniteError):  # said of each picture, when there is one
            self.pipe.finish(row.request, drawing.latents(row) * 0)
        compiled = time.perf_counter()
        rounds: list[float] = []
        while len(rounds) < ROUNDS and sum(rounds) < ROUND_SECONDS:
            start = time.perf_counter()
            drawing.walk(self.pipe, [row] * size, size, 1)
            rounds.append(time.perf_counter() - start)
        logger.info(
            "batches of %d compiled in %.1f s; a step takes %.1f ms", size, compiled - began, 1000 * min(rounds)
        )
        with self._guard:
            self._seconds.setdefault(key.shapes, {})[size] = min(rounds)

    def measured(self, key: Key, size: int, seconds: float) -> None:
        """Learn what a step of a batch took."""
        with self._guard:
            known = self._seconds[key.shapes]
            if size in known:
                known[size] += NEWEST * (seconds - known[size])

    def too_large(self, key: Key, size: int) -> None:
        """There is no memory for this size: never again."""
        with self._guard:
            fitting = [smaller for smaller in self.sizes if smaller < size] or [size]
            self._most[key.shapes] = fitting[-1]
            self._seconds[key.shapes] = {
                known: seconds for known, seconds in self._seconds[key.shapes].items() if known in fitting
            }
