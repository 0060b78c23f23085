"""From pictures to a job that is complete: encoding and storing, beside the loop."""

import base64
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image

from sdjax.serve.encoding import encode
from sdjax.serve.lanes import Lane
from sdjax.serve.leases import Leases
from sdjax.serve.store import Lease, Store
from sdjax.serve.work import Work, error_code

logger = logging.getLogger(__name__)


class Finisher:
    """One lane, so that a preview never comes after its picture.

    Args:
        store: what is finished goes there.
        leases: of the jobs, each ended when its job is.
        model: its name, for the parameters in a PNG.
        finished: called on this lane with a job's work, and "complete", "error" or "gone".
    """

    def __init__(self, store: Store, leases: Leases, *, model: str, finished: Callable[[Work, str], None]) -> None:
        self._store = store
        self._leases = leases
        self._model = model
        self._finished = finished
        self._lane = Lane("sdjax-encode")

    def finish(self, work: Work) -> None:
        """Encode and store a job's pictures, which are all drawn."""
        self._lane.do(partial(self._finish, work))

    def preview(self, lease: Lease, progress: dict[str, Any], picture: Image.Image) -> None:
        """Show a picture that is on its way."""
        self._lane.do(partial(self._preview, lease, progress, picture))

    def close(self, seconds: float) -> None:
        """Take no more, and wait so long for what is under way."""
        if not self._lane.close(seconds):
            logger.warning("pictures were not stored in time; their jobs are given back")

    def _finish(self, work: Work) -> None:
        job, fence = work.job, work.lease.fence
        began = time.perf_counter()
        how = "error"
        try:
            kind = job.request.get("response") or "png"
            words = job.request["prompt"], job.request.get("negative_prompt")
            images: list[tuple[str, bytes]] = []
            seeds: list[int] = []
            for _, (row, picture) in sorted(work.drawn.items()):
                seeds += row.request.seeds
                settings = {**row.request.settings, "seed": seeds[-1], "model": self._model}
                images.append((kind, encode(picture, kind, *words, settings)))
            work.seconds["encode"] = time.perf_counter() - began
            timings = {phase: round(seconds, 4) for phase, seconds in work.seconds.items()}
            data = {"format": kind, "seed": seeds[0], "seeds": seeds, "timings": timings}
            how = "complete" if self._store.finish(job.id, fence, images, data=data) else "gone"
        except Exception as error:
            logger.exception("could not be finished", extra={"job": job.id})
            self._store.fail(job.id, fence, error_code(error), str(error))
        finally:
            self._leases.end(job.id)
            self._finished(work, how)

    def _preview(self, lease: Lease, progress: dict[str, Any], picture: Image.Image) -> None:
        image = base64.b64encode(encode(picture, "png", "", None, {})).decode()
        self._leases.tell({lease.job.id: [("preview", {**progress, "image": image, "format": "png"})]})
