"""From a job that the engine is done with to its end in the store, beside the loop: pictures, an error, or given back.

An end that the store can't take now, since its disk is full or away, is held and tried again: the job keeps its lease
and its pictures until they are stored, until another has the job, or until the process stops.
"""

import base64
import logging
import threading
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

from PIL import Image

from sdjax.serve.encoding import encode
from sdjax.serve.failures import Failure, failure
from sdjax.serve.lanes import Lane
from sdjax.serve.leases import Leases
from sdjax.serve.patience import pause
from sdjax.serve.storage import StorageError, reason
from sdjax.serve.store import Lease, Store
from sdjax.serve.work import How, Work

TRIES = 5
"""How often an end is tried that fails for another reason than storage: the store has a fault, or the end itself."""

logger = logging.getLogger(__name__)


class End(NamedTuple):
    """How a job ends: `write` puts it into the store, and is False where the job is another's or final."""

    work: Work
    how: How
    write: Callable[[], bool]


class Finisher:
    """One lane, so that a preview never comes after its picture.

    Args:
        store: the ends go there.
        leases: of the jobs, each ended when its job is.
        model: its name, for the parameters in a PNG.
        wake: called on this lane when a job's end is stored, or it is another's: `Work.ended` says so.
    """

    def __init__(self, store: Store, leases: Leases, *, model: str, wake: Callable[[], None]) -> None:
        self._store = store
        self._leases = leases
        self._model = model
        self._wake = wake
        self._guard = threading.Lock()
        self._unstored: set[str] = set()
        self._lane = Lane("sdjax-encode")

    @property
    def unstored(self) -> int:
        """Jobs whose end the store didn't take, and is offered again."""
        with self._guard:
            return len(self._unstored)

    def finish(self, work: Work) -> None:
        """Encode and store a job's pictures, which are all drawn."""
        self._take(work, partial(self._finish, work))

    def fail(self, work: Work, error: Exception) -> None:
        """End a job as an error; the others don't notice."""
        why = failure(error, work.job.request)
        if why.code not in ("not_finite", "invalid_request"):
            logger.error("failed: %s", why.code, exc_info=error, extra={"job": work.job.id})
        self._take(work, partial(self._store_end, self._error(work, why)))
        work.rows = {}
        work.drawn = {}

    def give_back(self, work: Work) -> None:
        """Let a job wait again, as if it had not been leased."""
        write = partial(self._store.release, work.job.id, work.lease.fence)
        self._take(work, partial(self._store_end, End(work, "released", write)))

    def preview(self, lease: Lease, progress: dict[str, Any], picture: Image.Image) -> None:
        """Show a picture that is on its way."""
        self._lane.do(partial(self._preview, lease, progress, picture))

    def close(self, seconds: float) -> None:
        """Take no more, and wait so long for what is under way."""
        if not self._lane.close(seconds):
            logger.warning("the ends of some jobs were not stored in time; they are given back")

    def _take(self, work: Work, task: Callable[[], None]) -> None:
        """Become the job's owner: the engine's thread gives it up only when its end is sure to be stored."""
        self._lane.do(task)
        work.phase = "ending"

    def _finish(self, work: Work) -> None:
        try:
            end = self._complete(work)
        except Exception as error:
            logger.exception("could not be encoded", extra={"job": work.job.id})
            end = self._error(work, failure(error, work.job.request))
        self._store_end(end)

    def _complete(self, work: Work) -> End:
        """Encode the pictures."""
        job = work.job
        began = perf_counter()
        kind = job.request.get("response") or "png"
        words = job.request["prompt"], job.request.get("negative_prompt")
        images: list[tuple[str, bytes]] = []
        seeds: list[int] = []
        for _, (row, picture) in sorted(work.drawn.items()):
            seeds += row.request.seeds
            settings = {**row.request.settings, "seed": seeds[-1], "model": self._model}
            images.append((kind, encode(picture, kind, *words, settings)))
        work.seconds["encode"] = perf_counter() - began
        timings = {phase: round(seconds, 4) for phase, seconds in work.seconds.items()}
        data = {"format": kind, "seed": seeds[0], "seeds": seeds, "timings": timings}
        return End(work, "complete", partial(self._store.finish, job.id, work.lease.fence, images, data=data))

    def _error(self, work: Work, why: Failure) -> End:
        return End(work, "error", partial(self._store.fail, work.job.id, work.lease.fence, *why))

    def _store_end(self, end: End, tries: int = 0) -> None:
        try:
            is_ours = end.write()
        except Exception as error:
            self._store_end_later(end, tries + 1, error)
            return
        self._forget(end, end.how if is_ours else "gone")

    def _store_end_later(self, end: End, tries: int, error: Exception) -> None:
        """The store failed. Its storage may work again, however long that takes; anything else has so many tries."""
        job_id = end.work.job.id
        with self._guard:
            self._unstored.add(job_id)
        is_storage = isinstance(error, StorageError | OSError)
        if tries == 1 or not is_storage:
            what = reason(error) if isinstance(error, StorageError) else repr(error)
            logger.warning("the end of a job could not be stored, and is tried again: %s", what, extra={"job": job_id})
        if is_storage or tries < TRIES:
            self._lane.do(partial(self._store_end, end, tries), after=pause(tries))
        elif end.how == "complete":
            logger.error("the store refuses these pictures", exc_info=error, extra={"job": job_id})
            self._store_end(self._error(end.work, failure(error, end.work.job.request)))
        else:
            logger.error("the store refuses this end: the lease runs out", exc_info=error, extra={"job": job_id})
            self._forget(end, "gone")

    def _forget(self, end: End, how: How) -> None:
        job_id = end.work.job.id
        with self._guard:
            self._unstored.discard(job_id)
        self._leases.end(job_id)
        end.work.ended = how
        self._wake()

    def _preview(self, lease: Lease, progress: dict[str, Any], picture: Image.Image) -> None:
        image = base64.b64encode(encode(picture, "png", "", None, {})).decode()
        self._leases.tell({lease.job.id: [("preview", {**progress, "image": image, "format": "png"})]})
