"""Threads that do one thing after the other."""

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Lane:
    """One thread and what it has yet to do. It is a daemon: a compilation that lasts minutes delays nobody's exit."""

    def __init__(self, name: str) -> None:
        self._tasks: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, task: Callable[[], None], after: float = 0.0) -> None:
        """Have it done after what was asked for before, and not before so many seconds. A task reports its own
        failures.
        """
        with self._changed:
            heapq.heappush(self._tasks, (time.monotonic() + after, next(self._numbers), task))
            self._changed.notify()

    def close(self, seconds: float) -> bool:
        """Work off what there is, for so long, and end; False when the time was too short."""
        with self._changed:
            self._deadline = time.monotonic() + max(0.0, seconds)
            self._changed.notify()
        self._thread.join(max(0.0, seconds))
        with self._changed:
            return not self._tasks and not self._thread.is_alive()

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except Exception:
                logger.exception("a task failed")

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while True:
                now = time.monotonic()
                if self._deadline is not None and (not self._tasks or now >= self._deadline):
                    return None
                if self._tasks and self._tasks[0][0] <= now:
                    return heapq.heappop(self._tasks)[2]
                self._changed.wait(self._tasks[0][0] - now if self._tasks else None)
