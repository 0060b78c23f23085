"""The leases that an engine holds, kept alive also while its device is busy."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdjax.serve.storage import StorageError, reason
from sdjax.serve.store import Lease, Store, Tick

Events = Sequence[tuple[str, Mapping[str, Any]]]

RENEWALS = 4
"""Signs of life in the time of one lease: three may be late."""

logger = logging.getLogger(__name__)


class Leases:
    """What is leased, and a thread that renews it.

    A compilation can last longer than a lease, so signs of life do not depend on slices. They stop when `is_alive` says
    that the engine has not moved for too long: then its jobs are to be others'.

    Args:
        store: gives the leases.
        owner: the engine's name.
        seconds: of each lease.
        is_alive: asked before each renewal.
        lost: called when a job was cancelled or given to another, and isn't held any more, by whichever thread learns
            it.
    """

    def __init__(
        self,
        store: Store,
        *,
        owner: str,
        seconds: float,
        is_alive: Callable[[], bool],
        lost: Callable[[], None],
    ) -> None:
        self._store = store
        self._owner = owner
        self._seconds = seconds
        self._is_alive = is_alive
        self._lost = lost
        self._guard = threading.Lock()
        self._held: dict[str, Lease] = {}
        self._renewed = time.time()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="sdjax-leases", daemon=True)
        self._thread.start()

    def take(self, bucket: str | None) -> Lease | None:
        """Lease the longest waiting job of a bucket, if there is one.

        Leasing ends the leases that have run out. Where those that are held could not be renewed for a while, or the
        clock was set in between, they are renewed first: they must not be among them.
        """
        if self.held() and not 0 <= time.time() - self._renewed < self._seconds / 2:
            self.tell({})
        leases = self._store.lease(bucket, 1, owner=self._owner, seconds=self._seconds)
        with self._guard:
            self._held.update({lease.job.id: lease for lease in leases})
        return leases[0] if leases else None

    def tell(self, events: Mapping[str, Events]) -> None:
        """Add events to the stories of jobs by id, and renew all leases."""
        now = time.time()
        with self._guard:
            ticks = [Tick(job_id, lease.fence, events.get(job_id, ())) for job_id, lease in self._held.items()]
        if not ticks:
            return
        gone = self._store.tick(ticks, seconds=self._seconds)
        self._renewed = now
        lost = [job_id for job_id in gone if self.end(job_id) is not None]
        if lost:
            self._lost()

    def end(self, job_id: str) -> Lease | None:
        """Hold a lease no longer."""
        with self._guard:
            return self._held.pop(job_id, None)

    def held(self) -> Mapping[str, Lease]:
        """Those that are held, by job."""
        with self._guard:
            return dict(self._held)

    def close(self) -> None:
        """Renew no more, and give back what is held."""
        self._closed.set()
        self._thread.join()
        for job_id, lease in self.held().items():
            self.end(job_id)
            try:
                self._store.release(job_id, lease.fence)
            except Exception as error:
                logger.warning("could not be given back, so its lease runs out: %s", error, extra={"job": job_id})

    def _renew(self) -> None:
        while not self._closed.wait(self._seconds / RENEWALS):
            if not self._is_alive():
                logger.error("the engine has not moved for too long: its leases are not renewed")
                continue
            try:
                self.tell({})
            except StorageError as error:
                logger.warning("leases could not be renewed; they will be tried again: %s", reason(error))
            except Exception:
                logger.exception("leases could not be renewed; they will be tried again")
