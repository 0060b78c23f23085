"""Lease jobs from the store as slots become free. The engine's thread alone calls it."""

import time
from collections.abc import Callable

from sdjax.serve.finisher import Finisher
from sdjax.serve.leases import Leases
from sdjax.serve.patience import Patience
from sdjax.serve.preparer import Preparer
from sdjax.serve.readiness import COMPILING_AT_ONCE, Readiness
from sdjax.serve.scheduling import Blocked, admit
from sdjax.serve.store import Store
from sdjax.serve.work import How, Work, Works


class Intake:
    """Takes jobs in the order in which they came, as far as `scheduling.admit` lets it.

    Args:
        store: where jobs wait.
        leases: takes them.
        works: the jobs of this engine.
        preparer: makes their rows.
        finisher: gives back those that were leased in vain.
        readiness: whether what a job needs is compiled.
        slots: pictures that are drawn at once.
        patience: with the store.

    Attributes:
        leased_at: when it took the last job, by the monotonic clock.
    """

    def __init__(
        self,
        store: Store,
        leases: Leases,
        works: Works,
        preparer: Preparer,
        finisher: Finisher,
        readiness: Readiness,
        *,
        slots: int,
        patience: Patience,
    ) -> None:
        self._store = store
        self._leases = leases
        self._works = works
        self._preparer = preparer
        self._finisher = finisher
        self._slots = slots
        self._readiness = readiness
        self._patience = patience
        self._blocked: Blocked | None = None
        self._alone = False
        self.leased_at = 0.0

    def fill(self) -> None:
        """Fill free slots from the queue, unless the store has just failed."""
        if not self._patience.is_over:
            return
        try:
            while self._has_room() and self._take_one():
                pass
        except Exception as error:
            self._patience.failed(error)

    def give_back(self) -> None:
        """Give back what hasn't begun: the process is about to end."""
        for work in self._works.undrawn():
            if not work.slots:
                self._finisher.give_back(work)

    def reconcile(self, forgotten: Callable[[How], None]) -> None:
        """Make the jobs those that are leased: `forgotten` is called with how each has ended that is none any more, and
        a lease of a job that isn't known is given back.
        """
        held = self._leases.held()
        for work in self._works:
            is_gone = work.phase != "ending" and work.job.id not in held  # it was cancelled, or is another's
            how = "gone" if is_gone else work.ended
            if how is not None:
                forgotten(how)
                self._works.remove(work.job.id)
        for job_id, lease in held.items():
            if job_id not in self._works:
                work = Work(lease, 1)
                self._finisher.give_back(work)
                self._works.add(work)

    def _has_room(self) -> bool:
        return self._works.taken() < self._slots and len(self._works.in_phase("ending")) <= self._slots

    def _take_one(self) -> bool:
        """Take the job whose turn it is; False where nobody's is.

        A job that was drawn by a process that died is suspected of its death, and drawn alone: should the process die
        again, no other job is blamed for it. Jobs for which something is compiled hold up neither slots nor queue.
        """
        if self._alone and self._works:
            return False
        self._alone = False
        compiling = {work.job.bucket for work in self._works.in_phase("compiling")}
        queued = list(self._store.waiting())
        is_busy = len(compiling) >= COMPILING_AT_ONCE
        waiting = [b for b in queued if b not in compiling and (not is_busy or b in self._readiness.buckets)]
        running = {work.job.bucket for work in self._works.in_phase("preparing", "drawing")}
        bucket, self._blocked = admit(waiting, running, self._blocked, time.monotonic())
        if bucket is None and (queued or self._works):
            return False
        # An idle engine asks also when nobody waits, for asking is what brings lost jobs back.
        lease = self._leases.take(bucket)
        self._patience.worked()
        if lease is None:
            return False
        job = lease.job
        others = bool(self._works)
        is_known = self._readiness.is_known(job)
        work = Work(lease, job.request.get("num_images") or 1, phase="preparing" if is_known else "compiling")
        # The clock on the wall may be set back in between.
        work.seconds["queued"] = max((job.started or job.created) - job.created, 0.0)
        self._alone = job.attempts > 1
        if self._alone and others:
            self._finisher.give_back(work)
            self._works.add(work)
            return False
        self._works.add(work)
        self.leased_at = time.monotonic()
        try:
            self._preparer.prepare(lease, is_quick=is_known)
        except Exception as error:
            work.error = error
        return True
