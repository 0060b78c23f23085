"""Threads that do one thing after the other."""

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Lane:
    """One thread and what it has yet to do. It is a daemon: a compilation that lasts minutes delays nobody's exit."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, task: Callable[[], None]) -> None:
        """Have it done after what was asked for before. A task reports its own failures."""
        self._tasks.put(task)

    def close(self, seconds: float) -> bool:
        """Take no more and wait for the rest; False when the time was too short."""
        self._tasks.put(None)
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                logger.exception("a task failed")
