"""The leases that an engine holds, kept alive also while its device is busy."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
        lost: called with a job that was cancelled or given to another, by whichever thread learns it.
    """

    def __init__(
        self,
        store: Store,
        *,
        owner: str,
        seconds: float,
        is_alive: Callable[[], bool],
        lost: Callable[[str], None],
    ) -> None:
        self._store = store
        self._owner = owner
        self._seconds = seconds
        self._is_alive = is_alive
        self._lost = lost
        self._guard = threading.Lock()
        self._held: dict[str, Lease] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="sdjax-leases", daemon=True)
        self._thread.start()

    def take(self, bucket: str | None) -> Lease | None:
        """Lease the longest waiting job of a bucket, if there is one."""
        leases = self._store.lease(bucket, 1, owner=self._owner, seconds=self._seconds)
        with self._guard:
            self._held.update({lease.job.id: lease for lease in leases})
        return leases[0] if leases else None

    def tell(self, events: Mapping[str, Events]) -> None:
        """Add events to the stories of jobs by id, and renew all leases."""
        with self._guard:
            ticks = [Tick(job_id, lease.fence, events.get(job_id, ())) for job_id, lease in self._held.items()]
        if ticks:
            for job_id in self._store.tick(ticks, seconds=self._seconds):
                if self.end(job_id):
                    self._lost(job_id)

    def end(self, job_id: str) -> Lease | None:
        """Hold a lease no longer."""
        with self._guard:
            return self._held.pop(job_id, None)

    def give_back(self, lease: Lease) -> None:
        """Let the job wait again, as if it had not been leased."""
        self.end(lease.job.id)
        self._store.release(lease.job.id, lease.fence)

    def held(self) -> list[Lease]:
        """Those that are held."""
        with self._guard:
            return list(self._held.values())

    def close(self) -> None:
        """Renew no more, and give back what is held."""
        self._closed.set()
        self._thread.join()
        for lease in self.held():
            self.give_back(lease)

    def _renew(self) -> None:
        while not self._closed.wait(self._seconds / RENEWALS):
            if not self._is_alive():
                logger.error("the engine has not moved for too long: its leases are not renewed")
                continue
            try:
                self.tell({})
            except Exception:
                logger.exception("leases could not be renewed; they will be tried again")
