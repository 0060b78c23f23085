"""A leased job on its way through the engine."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sdjax.errors import NotFiniteError, RequestError
from sdjax.serve.drawing import Row
from sdjax.serve.store import Job, Lease


@dataclass
class Work:
    """A leased job. It has one owner at a time: the engine's thread, and then the finisher's.

    Attributes:
        lease: the right to draw it.
        pictures: how many it has.
        steps: of each picture's walk.
        done: steps that are done, by picture.
        told: the last step that its story speaks of.
        began: whether a picture has had a slot.
        drawn: finished pictures, by number.
        seconds: by phase.
    """

    lease: Lease
    pictures: int
    steps: int = 0
    done: dict[int, int] = field(default_factory=dict)
    told: int = 0
    began: bool = False
    drawn: dict[int, tuple[Row, Image.Image]] = field(default_factory=dict)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def job(self) -> Job:
        """What was leased."""
        return self.lease.job

    @property
    def preview_every(self) -> int:
        """Steps between previews, 0 for none."""
        return self.job.request.get("preview_every") or 0

    @property
    def left(self) -> int:
        """Steps that its pictures have before them, as far as it is known."""
        steps = self.steps or self.job.request.get("steps") or 0
        return max(0, self.pictures * steps - sum(list(self.done.values())))

    def progress(self) -> dict[str, Any]:
        """How far it is; of several pictures, in steps of one."""
        done = sum(self.done.values()) / self.pictures
        return {"step": int(done), "total": self.steps, "percent": round(100 * done / max(self.steps, 1), 1)}


def error_code(error: Exception) -> str:
    """What clients are told a failure is: "not_finite", "invalid_request", "out_of_memory" or "internal"."""
    if isinstance(error, NotFiniteError):
        return "not_finite"
    if isinstance(error, RequestError):
        return "invalid_request"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out_of_memory"
    return "internal"
