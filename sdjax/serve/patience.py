"""How long a store that failed is left alone before it is asked again."""

import logging
import time

from sdjax.serve.storage import StorageError, reason

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0

logger = logging.getLogger(__name__)


def pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row, at least one."""
    return min(FIRST_PAUSE * 2.0 ** min(failures - 1, 10), LONGEST_PAUSE)


class Patience:
    """Counts the failures of a store in a row, logs them, and spaces the attempts. For one thread."""

    def __init__(self) -> None:
        self._failures = 0
        self._next = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the store may be asked."""
        return time.monotonic() >= self._next

    def failed(self, error: Exception) -> None:
        """Ask no more for a while."""
        self._failures += 1
        self._next = time.monotonic() + pause(self._failures)
        if isinstance(error, StorageError):
            logger.warning("the store fails, and is asked again: %s", reason(error))
        else:
            logger.error("the store fails, and is asked again", exc_info=error)

    def worked(self) -> None:
        """Something was written: all is well."""
        if self._failures:
            logger.info("the store works again")
        self._failures = 0
        self._next = 0.0
